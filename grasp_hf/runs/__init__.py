"""Runs recipes: plans, prepares, merges, saves, pushes, appends and reproduces."""
