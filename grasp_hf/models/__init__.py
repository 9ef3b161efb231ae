"""A transformers model: its class, its data, its gradients, its training, and what is private upstream."""
