"""The record of a merge: its report, card and figures, and how they are saved."""
