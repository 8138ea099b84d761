"""`pytest benchmarks --benchmark-only`: every op and row kernel at toy sizes."""
