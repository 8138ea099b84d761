"""The passes as they run on a GPU, on CPU tensors: the host reads no value, the row kernels are any
set of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch._library.custom_ops import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode

from nitp_ops.core import checks
from nitp_ops.kernels import select
from nitp_ops.ops import alignment, gradients, swiglu
from nitp_ops.ops.cross_entropy import autograd as token_autograd
from nitp_ops.ops.cross_entropy.logits import autograd as logits_autograd
from nitp_ops.ops.implicit_token import autograd as latent_autograd

#: Operators that make the host wait for a value.
READS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "_unique2",
    "item",
}

OWN: dict[Any, Any] = {
    op._opoverload: op
    for module in (alignment, gradients, latent_autograd, logits_autograd, swiglu, token_autograd)
    for op in vars(module).values()
    if isinstance(op, CustomOpDef)
}


def inside(mode: TorchDispatchMode, func: Any, args: Any, kwargs: Any) -> Any:
    """One of the library's own operators, what it calls seen by the mode: that is off in its own
    handler."""
    with mode:
        return OWN[func]._init_fn(*args, **kwargs)


class NoReading(TorchDispatchMode):
    """Refuses every operator that makes the host wait for a value, also inside the library's own
    operators."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        assert name not in READS, f"{func} reads a value"
        assert name != "index" or not any(
            x is not None and x.dtype == torch.bool for x in args[1]
        ), f"{func} by a mask"
        if func not in OWN:
            return func(*args, **(kwargs or {}))
        return inside(self, func, args, kwargs or {})


@contextmanager
def without_reading(kernels: Any = None) -> Iterator[None]:
    """Here the passes take the way of a GPU, over the row kernels `kernels` (the CPU's own if
    None)."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(checks, "host_reads", lambda device: False))
        if kernels is not None:
            stack.enter_context(mock.patch.object(select, "row_kernels", lambda backend: kernels))
        yield
