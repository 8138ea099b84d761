"""What `examples/pretrain.py` is made of: corpus, model, schedule, checkpoint, training loop, report."""
