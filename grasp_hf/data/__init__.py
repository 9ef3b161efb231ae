"""From the `data:` section of a recipe to samples that a model takes."""
