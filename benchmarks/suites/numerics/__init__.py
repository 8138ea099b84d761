"""The pages of numbers under docs/: `python -m benchmarks.suites.numerics`."""
