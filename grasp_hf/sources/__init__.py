"""Read the files of a source into tensors of the target's names and shapes; refuse a source that does not fit."""
