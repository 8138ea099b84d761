"""`benchmarks/gpu.sh bundle`: peers and the built library for a machine without a network."""
