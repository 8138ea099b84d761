"""Whether a call must pass PyTorch's dispatcher, or may take the shorter way of a plain
autograd.Function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def needs_dispatcher(tensors: Iterable[Tensor | None]) -> bool:
    """Whether somebody watches: a trace, a dispatch mode, a functional transform or a tensor
    subclass.

    They know a custom op by its schema and its fake kernel, where a plain function would be looked
    into: its chunk loop unrolled, its reads of values refused. Without any of them the custom op's
    autograd costs 0.3 ms a call."""
    return (
        torch.compiler.is_compiling()
        # also make_fx, FakeTensorMode, functionalization
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]
        or any(
            tensor is not None and (type(tensor) not in _PLAIN or tensor.is_meta)
            for tensor in tensors
        )
    )


def plain_function(
    name: str, run: Callable[..., Any], save: Callable[..., None], differentiate: Callable[..., Any]
) -> Callable[..., Any]:
    """`run` as an autograd.Function of that name: what a custom op of it does with the same
    `save(ctx, inputs, output)` and `differentiate(ctx, *upstream)`."""

    def forward(ctx, *inputs: Any) -> Any:
        output = run(*inputs)
        save(ctx, inputs, output)
        return output

    members = {
        "forward": staticmethod(forward),
        "backward": staticmethod(differentiate),
        "__doc__": run.__doc__,
    }
    return type(name, (torch.autograd.Function,), members).apply
