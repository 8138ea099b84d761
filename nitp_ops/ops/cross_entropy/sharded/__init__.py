"""An unembedding whose rows are on several ranks, and rows of hidden states on several ranks."""
