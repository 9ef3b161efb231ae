"""How much of a source is merged: a file for each method, and the table of them."""
