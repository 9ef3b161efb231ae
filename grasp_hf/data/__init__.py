"""Load the data of a recipe's `data:` section and prepare it as a model's samples."""
