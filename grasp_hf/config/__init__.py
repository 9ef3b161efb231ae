"""The settings of a merge, from Python or from a recipe, and their checks."""
