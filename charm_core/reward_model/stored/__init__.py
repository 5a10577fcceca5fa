"""What is stored of a reward model, looked at before any weight is read: its files, its kind, what is missing. No torch."""
