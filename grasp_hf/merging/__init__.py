"""One step of a merge: a source is measured, mixed in, validated, and kept or undone."""
