"""What the predictions of the sources teach: how much each is worth, a stacked teacher, and a student of it."""
