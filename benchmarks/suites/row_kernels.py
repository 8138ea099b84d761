"""The row kernels by themselves on a GPU: the share of a copy's bandwidth that each reaches.

A kernel's floor is one copy of as many bytes as it must read and write, each number once; what it
reads again and its values a row are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.cases import Sizes
from benchmarks.implementations import BACKENDS
from benchmarks.measure import cpu, cuda
from benchmarks.measure.isolated import At
from nitp_ops.kernels import select, table

#: Sizes of a kernel: what a chunk of a real model has. The smaller of two fit into the L2 cache.
SIZES: dict[str, tuple[Sizes, ...]] = {
    "alignment_rows_": ({"N": 4096, "D": 1280}, {"N": 16384, "D": 4096}),
    "cross_entropy_rows_": (
        {"N": 2048, "D": 32000},
        {"N": 4096, "D": 128256},
        {"N": 4096, "D": 151936},
    ),
    "cross_entropy_gradient_rows_": ({"N": 2048, "D": 32000}, {"N": 4096, "D": 75968}),
    "accumulate_rows_": ({"N": 32000, "D": 1024}, {"N": 128256, "D": 4096}),
    "prepare_rows_": ({"N": 8192, "D": 1}, {"N": 131072, "D": 1}),
    "finish_rows_": ({"N": 8192, "D": 1}, {"N": 131072, "D": 1}),
}
KERNELS = {
    name: SIZES.get(name, ({"N": 2048, "D": 2048}, {"N": 8192, "D": 8192}))
    for name in table.all_kernels()
}
#: Who has row kernels.
NAMES = [name for name in BACKENDS if name != "ours-reference"]
#: The sum takes narrower addends only; what stands before the chunks and after them has no storage
#: dtype.
NARROW = {"accumulate_rows_", "prepare_rows_", "finish_rows_"}


def dtypes_of(kernel: str) -> list[str]:
    return [name for name in cuda.DTYPES if name == "bfloat16" or kernel not in NARROW]


def measure_kernel(
    at: At, names: list[str], *, kernel: str, sizes: Sizes, dtype: str, rounds: int, seconds: float
):
    """Rows by name (cuda.measure_case): the copy, and the kernel of each backend."""
    with cuda.DEVICE:
        call = table.all_kernels()[kernel].sample(sizes["N"], sizes["D"], cuda.DTYPES[dtype])
        # the copy reads one half of the bytes and writes the other
        source = torch.randint(256, (call.moved // 2,), dtype=torch.uint8)
        copied = torch.empty_like(source)
    results: dict[str, dict[str, Any]] = {cpu.FLOOR: {"bytes": call.moved}}
    runs: dict[str, Callable[[], object]] = {cpu.FLOOR: partial(copied.copy_, source)}
    for name in names:
        at(name)

        def first(name: str = name) -> dict[str, Any]:
            device = select.select_backend(kernel, cuda.DEVICE, BACKENDS[name])
            runs[name] = partial(getattr(select.row_kernels(device), kernel), *call.arguments)
            runs[name]()
            return {}

        results[name] = cuda.attempt(name, first)
        if "skipped" in results[name]:
            runs.pop(name, None)
    at(None)
    return cpu.described(results, cuda.timed(runs, call.restore, rounds, seconds), runs)
