"""A Hugging Face Hub on the loopback, for the real clients: start with `server.HubServer`."""
