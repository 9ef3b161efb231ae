"""From the files of a source to tensors as the target would hold them, checked or refused."""
