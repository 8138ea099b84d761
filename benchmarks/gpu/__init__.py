"""Runs on a GPU: what `benchmarks/gpu.sh` does there, and the documents that come back."""
