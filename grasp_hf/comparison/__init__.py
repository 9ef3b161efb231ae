"""Compares merging methods on the same labels with the same fine-tuning."""
