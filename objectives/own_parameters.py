"""Parameters that an objective brings along: raw, with initial values that depend on the seed alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .model_info import ModelInfo


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """What is drawn inside is drawn on the CPU and depends on the seed alone; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


class OwnHead(nn.Module):
    """An unembedding ``weight [V, d]`` beside the model's: untied, no bias, normal(0, initializer_range) at first."""

    def __init__(self, info: ModelInfo, seed: int) -> None:
        super().__init__()
        self.seed, self.initializer_range = seed, info.initializer_range
        self.weight = nn.Parameter(torch.empty(info.vocab_size, info.hidden_size, dtype=info.dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial values anew, always the same ones; on the meta device nothing happens."""
        if not self.weight.is_meta:
            with drawing(self.seed):
                self.weight.copy_(torch.empty(self.weight.shape).normal_(0.0, self.initializer_range))
