"""A demonstration: makes models of handwritten digits, merges them, and compares the result with controls."""
