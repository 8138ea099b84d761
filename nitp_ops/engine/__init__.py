"""What every objective shares: specs, streams, windows, the plan of passes, weights, counts and
metrics."""
