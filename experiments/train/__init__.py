"""A training: text, model, options, loop, checkpoints, evaluation."""
