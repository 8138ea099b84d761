"""`benchmarks/gpu.sh short`: what is worth most, within a budget of seconds."""
