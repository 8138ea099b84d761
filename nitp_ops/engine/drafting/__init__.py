"""Decoding with the heads of an objective: drafts, and the check of them by the model."""
