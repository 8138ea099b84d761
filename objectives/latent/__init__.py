"""Objectives whose targets are hidden states, embeddings or summaries of later tokens."""
