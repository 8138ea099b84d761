"""What `pretrain.py` and `experiments.py` are made of: corpus, model, training loop, arms, probes, reports."""
