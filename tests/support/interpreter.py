"""The Triton row kernels on CPU tensors, by Triton's interpreter, in a process of its own.

Triton decides when it is imported whether it interprets: TRITON_INTERPRET must be set before, and
afterwards that process can compile nothing. So one worker process has the variable and this one has
not; tensors travel there and back with their strides and the whole storage around them, so that a
write beside a row shows.
"""

import copy
import functools
import io
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

import nitp_ops  # noqa: F401  # loads the compiled row kernels
from benchmarks.gpu.sanitize import without_totals

#: One rounding of the storage dtype, and the size below which a difference is rounding of something
#: larger.
RELATIVE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 2.0**-7,
    torch.float16: 2.0**-10,
}
ABSOLUTE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 1e-5, torch.float16: 2e-6}
FLOATS = tuple(RELATIVE)
COLUMNS = (1, 7, 31, 128, 1000, 9001)


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def _pack(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(value: bytes) -> Any:
    return torch.load(io.BytesIO(value))


def _call(name: str, packed: bytes) -> bytes:
    from nitp_ops.kernels import triton

    arguments = _unpack(packed)
    getattr(triton, name)(*arguments)
    return _pack(arguments)


@functools.cache
def _worker() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_interpret)


def interpreted(name: str, *arguments: Any) -> list[Any]:
    """The arguments as the Triton kernel `name` leaves them; those given here stay as they are."""
    return _unpack(_worker().submit(_call, name, _pack(list(arguments))).result())


def native(name: str, *arguments: Any) -> list[Any]:
    """The arguments as the compiled CPU kernel leaves them."""
    arguments = copy.deepcopy(arguments)
    getattr(torch.ops.nitp_ops, name)(*arguments)
    return list(arguments)


def apart(rows: Tensor) -> Tensor:
    """The same rows as part of wider ones, with 2 numbers before and 3 behind each."""
    wide = torch.full((rows.shape[0], rows.shape[1] + 5), 77.0, dtype=rows.dtype)
    wide[:, 2:-3] = rows
    return wide[:, 2:-3]


def whole(tensor: Tensor) -> Tensor:
    """All of the storage that a view is part of."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


def equal(name: str, *arguments: Any) -> list[Any]:
    """The arguments as Triton leaves them, once they agree with the CPU kernel's, NaN and infinity
    included."""
    ours, theirs = interpreted(name, *arguments), native(name, *arguments)
    without_totals(name, theirs, ours)
    for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(a, Tensor):
            rtol, atol, where = (
                RELATIVE.get(b.dtype, 0.0),
                ABSOLUTE.get(b.dtype, 0.0),
                f"argument {place} of {name}: ",
            )
            torch.testing.assert_close(
                whole(a), whole(b), rtol=rtol, atol=atol, equal_nan=True, msg=where.__add__
            )
    return ours
