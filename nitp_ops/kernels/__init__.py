"""One row kernel, four implementations, one table: compiled for CPU and CUDA (csrc/), Triton, torch
operations."""
