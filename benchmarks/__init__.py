"""`python -m benchmarks`: every op beside eager and torch.compile, against the cost of its own
GEMMs or bytes."""
