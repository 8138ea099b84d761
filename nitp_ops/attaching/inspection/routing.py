"""The calls of one module: standing in for it, and what a call of it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def routed(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """`module` computes `function`, without the hooks around its own forward, which come back with
    it."""
    stand_in: dict[str, Any] = {"forward": function}
    stand_in |= {
        name: type(getattr(module, name))() for name in ("_forward_pre_hooks", "_forward_hooks")
    }
    own = {name: module.__dict__[name] for name in stand_in if name in module.__dict__}
    module.__dict__.update(stand_in)
    try:
        yield
    finally:
        for name in stand_in:
            del module.__dict__[name]
        module.__dict__.update(own)


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a block or a norm reads: the first tensor of its call."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
