"""The Hugging Face Hub: the only room that uses the network."""
