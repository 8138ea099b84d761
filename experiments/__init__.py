"""What repeats trainings and draws conclusions; `examples/pretrain.py` and `examples/draft.py` are
made of it too."""
