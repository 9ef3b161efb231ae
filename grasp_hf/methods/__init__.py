"""How much of a source is merged: one file for each method, and the function that finds it by name."""
