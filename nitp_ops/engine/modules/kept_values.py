"""Own parameters that move to the meta device and come back: engines shard a model there and refill
it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .dtensor import fill


class KeepsValues(nn.Module):
    """A module whose parameters and buffers come back from the meta device with the values that
    they had.

    A program that moves a model to the meta device refills it from its state dict, where an objective's
    parameters need not be. Values that never were anywhere else are drawn from the seed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, Tensor] = {}

    def reset_parameters(self) -> None:
        """Draw the own parameters anew from the seed; on the meta device: as soon as they leave it."""
        self._kept.clear()
        for module in self._owners():
            module.reset_parameters()  # type: ignore[operator]

    def materialize(self, device: torch.device) -> None:
        """Whatever is on the meta device moves to `device`, with its values."""
        self._apply(
            lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor
        )

    def _owners(self) -> Iterator[nn.Module]:
        """The modules that draw values: those with a ``reset_parameters()``."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = {name: tensor.detach() for name, tensor in _tensors(self)}
        super()._apply(fn, recurse)
        back = {}
        for name, tensor in _tensors(self):
            if tensor.is_meta and not before[name].is_meta:
                self._kept[name] = before[name]
            elif before[name].is_meta and not tensor.is_meta:
                back[name] = tensor
        unknown = {id(tensor) for name, tensor in back.items() if name not in self._kept}
        for module in self._owners():
            if any(id(tensor) in unknown for _, tensor in _tensors(module)):
                module.reset_parameters()  # type: ignore[operator]
        for name in back.keys() & self._kept.keys():
            fill(back[name], self._kept.pop(name))
        return self


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
