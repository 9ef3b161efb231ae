"""How a model does on labels, and what is kept because of it."""
