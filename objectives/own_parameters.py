"""Parameters that an objective brings along: raw, with initial values that depend on the seed alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class Matrix(nn.Module):
    """``x W^T``, ``weight [rows, columns]``; no nn.Linear: quantisers and LoRA's "all-linear" leave it alone."""

    def __init__(self, rows: int, columns: int, info: ModelInfo) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=info.dtype))
        nn.init.normal_(self.weight, std=info.initializer_range)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """``make()`` on the default device, with initial values that depend on the seed alone; the meta device has none."""
    device = torch.get_default_device()
    if device.type == "meta":
        return make()
    with drawing(seed):
        module = make()
    return module.to(device)


@torch.no_grad()
def redraw(module: nn.Module, make: Callable[[], nn.Module], seed: int) -> None:
    """Give a module that ``make`` made its initial parameters and buffers again; on the meta device nothing happens."""
    if any(parameter.is_meta for parameter in module.parameters()):
        return
    with drawing(seed):
        fresh = make()
    mine, values = ([*each.parameters(), *each.buffers()] for each in (module, fresh))
    for old, new in zip(mine, values, strict=True):
        old.copy_(new)
