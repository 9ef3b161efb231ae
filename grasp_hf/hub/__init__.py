"""The Hugging Face Hub: the only part of the package that uses the network."""
