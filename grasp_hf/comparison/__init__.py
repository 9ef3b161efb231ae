"""What a merge is worth: methods run on the same labels with the same fine-tuning. Nothing else imports this room."""
