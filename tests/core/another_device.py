"""What MPS and Intel's client GPUs lack, on CPU tensors: float64, frexp, strided writes, compiled
kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves

from nitp_ops.core import checks, devices, gemm, library
from nitp_ops.kernels import select
from tests.core.without_reading import NoReading


class AnotherDevice(NoReading):
    """Refuses what such a device does wrong or not at all, also inside the library's own operators."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        assert name != "frexp", "frexp is not served"
        if name != "copy_":
            given = {
                argument.name: value
                for argument, value in zip(func._schema.arguments, args, strict=False)
            }
            given |= kwargs or {}
            for argument in func._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in tree_leaves(given.get(argument.name)):
                        assert tensor is None or tensor.is_contiguous(), (
                            f"{func} writes into strided memory"
                        )
        found = super().__torch_dispatch__(func, types, args, kwargs)
        for value in tree_leaves(found):
            assert not isinstance(value, torch.Tensor) or value.dtype != torch.float64, (
                f"{func} makes a float64 tensor"
            )
        return found


@contextmanager
def another_device() -> Iterator[None]:
    """Here CPU tensors are treated as those of a device that has nothing but torch's operations."""
    with ExitStack() as stack:
        for module, name, value in (
            (checks, "host_reads", lambda device: False),
            (devices, "WITH_FLOAT64", frozenset()),
            (gemm, "_STRIDED_OUT", frozenset()),
            (library, "load_error", "hidden"),
            (select, "load_error", "hidden"),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield
