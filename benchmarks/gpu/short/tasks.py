"""What a short run does on a GPU beside the cases: the machine, its ceilings, training steps,
chunks, warm caches."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import nitp_ops
from benchmarks.cases import OPS, Sizes
from benchmarks.implementations import BACKENDS, step
from benchmarks.measure import cuda, timing
from benchmarks.measure.isolated import At, Lost, one_line
from benchmarks.report import environment
from nitp_ops.core import library
from nitp_ops.kernels import select

#: Numbers of the copy and rows of the square GEMM that tell a GPU's ceilings.
COPIED, SQUARE = 2**32, 8192
GEMM = torch.bfloat16


def about(at: At, names: list[str], *, commit: str | None) -> dict[str, Any]:
    """The machine, and why the CUDA C++ kernels do not run there (None: they do); "refusal": there
    is no GPU."""
    at(None)
    if not torch.cuda.is_available():
        return {"refusal": "torch sees no GPU (torch.cuda.is_available() is False)"}
    built_of = None if select.load_error else library.build_info()["commit"]
    return {
        "machine": environment.gpu_machine(commit),
        "native": select.unavailable_reason(cuda.DEVICE),
        "built_of": built_of,
    }


def ceilings(at: At, names: list[str]) -> dict[str, dict[str, Any]]:
    """Bytes per second of a copy (read and written), FLOP/s of a square GEMM: what every floor
    comes from."""
    found = {}
    for name, make in (("copy", _copy), ("gemm", _gemm)):
        if name in names:
            at(name)
            with cuda.DEVICE:
                run, amount = make()
            seconds = cuda.seconds_of(run, 10)
            found[name] = {"milliseconds": 1e3 * seconds, "per_second": amount / seconds}
            cuda.settle()
    return found


def _copy() -> tuple[Callable[[], object], int]:
    source = torch.randint(256, (COPIED,), dtype=torch.uint8)
    copied = torch.empty_like(source)
    return partial(copied.copy_, source), 2 * source.nbytes


def _gemm() -> tuple[Callable[[], object], int]:
    left, right = (torch.randn(SQUARE, SQUARE).to(GEMM) for _ in range(2))
    return partial(torch.mm, left, right, out=torch.empty_like(left)), 2 * SQUARE**3


def training(at: At, names: list[str], **options: Any) -> dict[str, dict[str, Any]]:
    """One whole training step by each objective."""
    module = importlib.import_module("benchmarks.suites.training_step")
    found = {}
    for name in names:
        at(name)
        found[name] = cuda.attempt(name, partial(module.measure, cuda.DEVICE, name, **options))
    return found


def chunks(
    at: At, names: list[str], *, sizes: Sizes, rounds: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """linear_cross_entropy by rows of a chunk, which are the names, beside its GEMMs."""
    op = OPS["linear_cross_entropy"]
    with cuda.DEVICE:
        inputs, floor = op.inputs(sizes, GEMM), cuda.floor_of(op, sizes, GEMM)
    runs: dict[str, Callable[[], object]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        at(name)
        function = partial(
            nitp_ops.linear_cross_entropy,
            chunk_bytes=int(name) * sizes["V"] * GEMM.itemsize,
            backend=BACKENDS["ours"],
        )
        runs[name] = partial(step, function, inputs)
        found[name] = cuda.attempt(name, lambda run=runs[name]: (run(), {})[1])
        inputs.clear()
        if "skipped" in found[name]:
            del runs[name]
    at(None)
    times = cuda.timed(floor | runs, inputs.clear, rounds, seconds)
    best = min((times[form] for form in floor), key=lambda values: sorted(values)[len(values) // 2])
    for name in runs:
        found[name] |= {
            "milliseconds": timing.quartiles([1e3 * value for value in times[name]]),
            "times_floor": timing.ratios(times[name], best),
        }
    return found


def warm(at: At, names: list[str], *, cases: list[tuple[str, Sizes, str]], stop: Path) -> None:
    """One step of each implementation in each case until a file `stop` is there, so that compilers
    have run before anything is timed. What fails here fails again in its own case, where it is
    told."""
    for op, sizes, dtype in cases:
        with cuda.DEVICE:
            inputs = OPS[op].inputs(sizes, cuda.DTYPES[dtype])
        for name in names:
            if stop.exists():
                return
            at(name)
            try:
                step(cuda.function_of(op, name), inputs)
            except ValueError:  # it has no such op
                continue
            except Exception as error:
                print(f"warm: {op}, {name}: {one_line(error)}", flush=True)
            inputs.clear()
            try:
                cuda.settle()
            except RuntimeError:
                raise Lost(f"{name} broke the device") from None
        at(None)
