"""The row kernels by themselves on a GPU: the share of a copy's bandwidth that each reaches.

A kernel's floor is one copy of as many bytes as it must read and write, each number once; what it reads again and its
values a row are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nitp_ops import rows

from . import cuda, measure
from .cases import Sizes
from .implementations import BACKENDS
from .isolated import At


@dataclass(frozen=True)
class Call:
    """Arguments of one kernel; bytes that it must move; what puts back an input that it overwrites."""

    arguments: tuple[Any, ...]
    moved: int
    restore: Callable[[], object] = lambda: None


def _normal(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns).to(dtype)


def _swiglu(n: int, columns: int, dtype: torch.dtype) -> Call:
    gate, up, out = (_normal(n, columns, dtype) for _ in range(3))
    return Call((gate, up, out), 3 * gate.nbytes)


def _swiglu_backward(n: int, columns: int, dtype: torch.dtype) -> Call:
    gate, up, upstream, d_gate, d_up = (_normal(n, columns, dtype) for _ in range(5))
    return Call((gate, up, upstream, d_gate, d_up), 5 * gate.nbytes)


def _alignment(n: int, columns: int, dtype: torch.dtype) -> Call:
    prediction, target, gradient = (_normal(n, columns, dtype) for _ in range(3))
    stats, scale = torch.empty(4, n), torch.rand(n)
    return Call((prediction, target, None, scale, stats, gradient, None, 0, 1e-6, True), 3 * prediction.nbytes)


def _cross_entropy(n: int, columns: int, dtype: torch.dtype) -> Call:
    kept = _normal(n, columns, dtype)
    logits, labels, scale = kept.clone(), torch.randint(columns, (n, 1)), torch.rand(n)
    stats, picked, best = torch.empty(2, n), torch.empty(n, 1), torch.empty(n, dtype=torch.int64)
    options = -100, False, 0.0, 0.0, 0.0, 1.0, True
    arguments = logits, labels, None, None, None, scale, stats, picked, best, *options
    return Call(arguments, 2 * logits.nbytes, partial(logits.copy_, kept))


def _cross_entropy_gradient(n: int, columns: int, dtype: torch.dtype) -> Call:
    kept = _normal(n, columns, dtype)
    logits, labels, scale = kept.clone(), torch.randint(columns, (n, 1)), torch.rand(n, 1)
    picked, top = kept.gather(1, labels).float(), kept.float().amax(1)
    factors = torch.stack([top, 1 / (kept.float() - top[:, None]).exp().sum(1), torch.zeros(n)])
    arguments = logits, labels, scale, picked, None, None, factors, 0.0, 1.0
    return Call(arguments, 2 * logits.nbytes, partial(logits.copy_, kept))


def _accumulate(n: int, columns: int, dtype: torch.dtype) -> Call:
    total, addend = torch.zeros(n, columns), _normal(n, columns, dtype)
    return Call((total, addend), 2 * total.nbytes + addend.nbytes)


#: Kernel -> how to call it, and its sizes: what a chunk of a real model has. The smaller of two fit into the L2 cache.
KERNELS: dict[str, tuple[Callable[[int, int, torch.dtype], Call], tuple[Sizes, ...]]] = {
    "swiglu_rows": (_swiglu, ({"N": 2048, "D": 2048}, {"N": 8192, "D": 8192})),
    "swiglu_rows_backward_": (_swiglu_backward, ({"N": 2048, "D": 2048}, {"N": 8192, "D": 8192})),
    "alignment_rows_": (_alignment, ({"N": 4096, "D": 1280}, {"N": 16384, "D": 4096})),
    "cross_entropy_rows_": (
        _cross_entropy,
        ({"N": 2048, "D": 32000}, {"N": 4096, "D": 128256}, {"N": 4096, "D": 151936}),
    ),
    "cross_entropy_gradient_rows_": (_cross_entropy_gradient, ({"N": 2048, "D": 32000}, {"N": 4096, "D": 75968})),
    "accumulate_rows_": (_accumulate, ({"N": 32000, "D": 1024}, {"N": 128256, "D": 4096})),
}
#: Who has row kernels.
NAMES = [name for name in BACKENDS if name != "ours-reference"]
#: The sum takes narrower addends only.
NARROW = {"accumulate_rows_"}


def dtypes_of(kernel: str) -> list[str]:
    return [name for name in cuda.DTYPES if name == "bfloat16" or kernel not in NARROW]


def measure_kernel(at: At, names: list[str], *, kernel: str, sizes: Sizes, dtype: str, rounds: int, seconds: float):
    """Rows by name (cuda.measure_case): the copy, and the kernel of each backend."""
    make, _ = KERNELS[kernel]
    with cuda.DEVICE:
        call = make(sizes["N"], sizes["D"], cuda.DTYPES[dtype])
        # the copy reads one half of the bytes and writes the other
        source = torch.randint(256, (call.moved // 2,), dtype=torch.uint8)
        copied = torch.empty_like(source)
    results: dict[str, dict[str, Any]] = {measure.FLOOR: {"bytes": call.moved}}
    runs: dict[str, Callable[[], object]] = {measure.FLOOR: partial(copied.copy_, source)}
    for name in names:
        at(name)

        def first(name: str = name) -> dict[str, Any]:
            device = rows.choose(kernel, cuda.DEVICE, BACKENDS[name])
            runs[name] = partial(getattr(rows.kernels(device), kernel), *call.arguments)
            runs[name]()
            return {}

        results[name] = cuda.attempt(name, first)
        if "skipped" in results[name]:
            runs.pop(name, None)
    at(None)
    return measure.described(results, cuda.timed(runs, call.restore, rounds, seconds), runs)
