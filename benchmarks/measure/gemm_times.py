"""What the pages of numbers share: interleaved times, and GEMMs by the faster library that torch
reaches."""

from __future__ import annotations

import ctypes
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nitp_ops.core import gemm

from . import children, timing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Sizes = dict[str, Any]


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round, the first call of each left out."""
    for run in runs.values():
        run()
    return timing.interleave(runs, lambda: None, rounds=rounds, seconds=math.inf)


def medians(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in interleaved(runs, rounds).items()}


def ratio(times: list[float], base: list[float]) -> float:
    """The median of the ratios within rounds, which a drift of the machine's speed cancels from."""
    return timing.ratios(times, base)["median"]


def served(dtype: torch.dtype) -> bool:
    """Whether a library behind torch has GEMMs of such numbers here: else torch.mm multiplies one
    by one."""
    return dtype == torch.float32 or gemm.torch_has_bfloat16()


def widened(*tensors: Tensor) -> list[Tensor]:
    """In float32 where no library serves them; tensors that want a gradient stay such."""
    return [
        x if served(x.dtype) else x.detach().float().requires_grad_(x.requires_grad)
        for x in tensors
    ]


def multiplied(name: str, a: Tensor, b: Tensor, out: Tensor) -> dict[str, Callable[[], object]]:
    """out = a b by each library, of numbers widened beforehand where none serves them: runs for
    `faster`."""
    a, b, out = widened(a, b, out)
    runs: dict[str, Callable[[], object]] = {f"mm {name}": partial(torch.mm, a, b, out=out)}
    if a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        runs[f"onednn {name}"] = partial(onednn, a, b, out)
    return runs


def onednn(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a b in float32 by oneDNN, where torch.mm takes MKL: into `out` by what torch.mm calls for
    narrower numbers, which serves float32 too where the processor has those; else into new memory
    by torch.compile's linear layer."""
    matmul = _mkldnn_matmul()
    if matmul is None:
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    # an at::Tensor is a pointer to what _cdata names, and a reference the address of that pointer
    matmul(*(ctypes.byref(ctypes.c_void_p(x._cdata)) for x in (a, b, out)), 0.0, 1.0)
    return out


@functools.cache
def _mkldnn_matmul() -> Callable[..., None] | None:
    """ATen's mkldnn_matmul(a, b, out, beta, alpha); None where it would refuse, or has another
    signature."""
    library = ctypes.CDLL(str(Path(torch.__path__[0]) / "lib/libtorch_cpu.so"))
    name = "_ZN2at6native13mkldnn_matmulERKNS_6TensorES3_S3_ff"
    if not served(torch.bfloat16) or not hasattr(library, name):
        return None
    matmul = library[name]
    matmul.restype, matmul.argtypes = None, [*[ctypes.c_void_p] * 3, *[ctypes.c_float] * 2]
    return matmul


def own(name: str, a: Tensor, b: Tensor, out: Tensor) -> dict[str, Callable[[], object]]:
    """out = a b by nitp_ops itself, where it has such GEMMs."""
    if not gemm.has_native_gemm("cpu", a.dtype):
        return {}
    return {f"nitp_ops {name}": partial(torch.ops.nitp_ops.gemm_, out, a, b, False)}


def faster(times: dict[str, list[float]]) -> list[float]:
    """In each round the sum over the GEMMs, each by the library whose median is less."""
    total = [0.0] * min(len(each) for each in times.values())
    for name in (each.removeprefix("mm ") for each in times if each.startswith("mm ")):
        found = [
            times[f"{library} {name}"]
            for library in ("mm", "onednn")
            if f"{library} {name}" in times
        ]
        total = [a + b for a, b in zip(total, min(found, key=statistics.median), strict=True)]
    return total


def in_child(task: Callable[[], Any], threads: int, malloc: str = "default") -> Any:
    def configured() -> Any:
        children.configure(threads, malloc)
        return task()

    return children.in_child(configured)


def exponent(sizes: Sequence[int], times: Sequence[float]) -> float:
    """Slope of log time against log size, least squares."""
    x, y = [math.log(s) for s in sizes], [math.log(t) for t in times]
    return statistics.linear_regression(x, y).slope
