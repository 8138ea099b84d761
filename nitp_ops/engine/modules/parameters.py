"""Parameters that an objective brings along: raw, with initial values that depend on the seed
alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nitp_ops.engine.streams.model_info import ModelInfo

from .dtensor import fill
from .module_call import Sealed

#: Inner widths of own matrices, in hidden sizes: more than any model has.
_WIDEST = 256


def width_problems(size: int | None, info: ModelInfo) -> list[str]:
    """One line if an inner width is more than `_WIDEST` hidden sizes; None is a default."""
    most = _WIDEST * info.hidden_size
    if size is None or size <= most:
        return []
    return [f"intermediate_size is {size}, expected at most {most} ({_WIDEST} hidden_size)"]


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """What is drawn inside is drawn on the CPU and depends on the seed alone; the global generator
    stays as it was."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


class OwnParameters(Sealed):
    """Parameters of the given shapes (None: registered as absent), drawn from normal(0,
    initializer_range).

    They are raw, so that quantisers and adapters leave them alone. They are drawn in order, on the
    CPU, by an own
    generator: the values depend on the seed alone, not on the device, not on the global generator.
    """

    def __init__(self, info: ModelInfo, seed: int, **shapes: tuple[int, ...] | None) -> None:
        super().__init__()
        self.seed, self.initializer_range = seed, info.initializer_range
        for name, shape in shapes.items():
            empty = None if shape is None else nn.Parameter(torch.empty(shape, dtype=info.dtype))
            self.register_parameter(name, empty)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial values anew, always the same ones; on the meta device nothing happens.

        Where an engine has cut a parameter into DTensors each rank draws all of it and keeps its
        part.
        """
        generator = torch.Generator().manual_seed(self.seed)
        for parameter in self.parameters(recurse=False):
            if not parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                fill(parameter, values.normal_(0.0, self.initializer_range, generator=generator))


class OwnHead(OwnParameters):
    """An unembedding ``weight [V, d]`` beside the model's, without a bias; `through_head` reads it."""

    weight: nn.Parameter

    def __init__(self, info: ModelInfo, seed: int) -> None:
        super().__init__(info, seed, weight=(info.vocab_size, info.hidden_size))


class Matrix(nn.Module):
    """``x W^T``, ``weight [rows, columns]``; no nn.Linear: quantisers and LoRA's "all-linear" leave
    it alone."""

    def __init__(self, rows: int, columns: int, info: ModelInfo) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=info.dtype))
        nn.init.normal_(self.weight, std=info.initializer_range)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """``make()`` on the default device, with initial values that depend on the seed alone; the meta
    device has none."""
    device = torch.get_default_device()
    if device.type == "meta":
        return make()
    with drawing(seed):
        module = make()
    return module.to(device)


@torch.no_grad()
def redraw(module: nn.Module, make: Callable[[], nn.Module], seed: int) -> None:
    """Give a module that ``make`` made its initial parameters and buffers again; on the meta device
    nothing happens."""
    if any(parameter.is_meta for parameter in module.parameters()):
        return
    with drawing(seed):
        fresh = make()
    mine, values = ([*each.parameters(), *each.buffers()] for each in (module, fresh))
    for old, new in zip(mine, values, strict=True):
        fill(old, new)
