"""Validation on labelled samples: losses, their changes, the gate, and the line of a fine-tuning."""
