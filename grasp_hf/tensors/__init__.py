"""Arithmetic on tensors and mapped files: no model is loaded and no data is read here."""
