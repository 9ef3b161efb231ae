"""From a recipe to a run: prepared, planned, merged, delivered, appended to and reproduced."""
