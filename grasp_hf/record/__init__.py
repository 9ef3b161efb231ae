"""The record that a merge leaves: report, card, figures, and how they are saved."""
