"""The steps of a merge: each source is measured, mixed in, validated, and kept or undone."""
