"""The settings of a merge: what a user asks for, in Python or in a recipe, checked."""
