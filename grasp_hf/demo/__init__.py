"""The whole job on a small world of real handwritten digits. Nothing else imports this room."""
