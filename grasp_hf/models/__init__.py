"""A transformers model: its class, its target, its processor, its batches, its gradients and its training."""
