"""A CPU under the code that measures on a GPU."""

import time

import torch

from benchmarks.measure import cuda


def stand_in(monkeypatch):
    """The CUDA harness over CPU tensors: wall clock for events, no counters of an allocator."""
    monkeypatch.setattr(cuda, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(cuda, "Instant", time.perf_counter)
    monkeypatch.setattr(cuda, "FLUSH_BYTES", 16)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    held = iter([100, 350] * 999)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(held))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(held))
