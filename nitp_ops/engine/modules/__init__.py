"""Parameters: an objective's own, and a model's, read where engines allow it."""
