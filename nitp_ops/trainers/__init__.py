"""One adapter for each trainer: which microbatches make a window, how they are counted, where
losses are logged."""
