"""`python -m benchmarks --case scaling`: growth of time and memory with N, V, d and the number of
heads, error against the number of chunks, roofline. `python -m benchmarks plot` draws what `--save`
kept.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.cases import OPS, Sizes
from benchmarks.implementations import forward
from benchmarks.measure import cpu, process_memory
from benchmarks.measure.gemm_times import exponent, in_child, interleaved, multiplied, own
from benchmarks.measure.isolated import one_line
from benchmarks.report import environment, storage

from . import gate
from .numerics.objective_plan import Setting
from .numerics.token_loss import error_against_chunks, problem
from .numerics.token_loss import gemms as gemms_of

WHO = ("ours", "eager", "torch-best")
DTYPE = "bfloat16"
#: Axis -> what stays, and the sizes along it. "heads" is the number of head terms that share one
#: unembedding.
FULL: dict[str, tuple[Sizes, tuple[int, ...]]] = {
    "N": ({"d": 512, "V": 32768}, (128, 256, 512, 1024, 2048)),
    "V": ({"N": 512, "d": 256}, (8192, 16384, 32768, 65536, 131072)),
    "d": ({"N": 512, "V": 16384}, (128, 256, 512, 1024, 2048)),
    "heads": ({"N": 512, "d": 256, "V": 32768}, (1, 2, 4, 8)),
}
QUICK: dict[str, tuple[Sizes, tuple[int, ...]]] = {
    "N": ({"d": 16, "V": 64}, (8, 16)),
    "V": ({"N": 8, "d": 16}, (32, 64)),
    "d": ({"N": 8, "V": 32}, (8, 16)),
    "heads": ({"N": 8, "d": 16, "V": 32}, (1, 2)),
}
ERRORS = (4096, 64, 4096, (1, 4, 16, 64, 256)), (16, 4, 20, (1, 4))
ROOFLINE = (512, 32768, (4, 16, 64, 256, 1024)), (8, 32, (2, 8))
COPY = 2**26, 2**12
ROUNDS, QUICK_ROUNDS = 5, 2
#: Rows of a document where several heads read the same hidden state.
LENGTH = 128


def sweep(
    axis: str, fixed: Sizes, sizes: Sequence[int], rounds: int, threads: int
) -> dict[str, Any]:
    """Median milliseconds and extra bytes (gradients apart) of each size, and the exponents fitted
    to them."""
    names, make = (("ours", "eager"), _plan) if axis == "heads" else (WHO, _alone)
    times = in_child(partial(_times, axis, fixed, sizes, names, make, rounds), threads, "raised")
    points = []
    for size in sizes:
        rows = {}
        for name in names:
            if (name, size) not in times:
                rows[name] = {"skipped": times[name]}
                continue
            extra = in_child(partial(_extra_bytes, make, axis, fixed, size, name), threads)
            rows[name] = {
                "milliseconds": 1e3 * statistics.median(times[name, size]),
                "extra_bytes": extra,
            }
        points.append({"size": size, "rows": rows})
    return {
        "axis": axis,
        "fixed": fixed,
        "dtype": DTYPE,
        "points": points,
        "exponents": exponents(points),
    }


def exponents(points: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Slopes of log time and log extra memory over log size, least squares, of each who ran
    everywhere."""
    names = [
        name
        for name in points[0]["rows"]
        if all("skipped" not in point["rows"][name] for point in points)
    ]
    sizes = [point["size"] for point in points]
    return {
        name: {
            "time": exponent(sizes, [point["rows"][name]["milliseconds"] for point in points]),
            "memory": exponent(
                sizes, [max(1, point["rows"][name]["extra_bytes"]) for point in points]
            ),
        }
        for name in names
    }


Made = tuple[Callable[[], object], Callable[[], object], int]
"""A step; what drops its gradients; the bytes of these."""


def _alone(axis: str, fixed: Sizes, size: int, name: str) -> Made:
    op = OPS["linear_cross_entropy"]
    inputs = op.inputs({"N": 0, "d": 0, "V": 0} | fixed | {axis: size}, getattr(torch, DTYPE))
    gradients = sum(leaf.nbytes for leaf in inputs.leaves.values())
    return cpu.Step(forward(op.name, name), inputs), inputs.clear, gradients


def _plan(axis: str, fixed: Sizes, size: int, name: str) -> Made:
    offsets = list(range(2, size + 1))
    spec = f"ntp + mtp_parallel(offsets={offsets}, heads=residual)" if offsets else "ntp"
    length = min(LENGTH, fixed["N"])
    sizes = fixed["N"], fixed["d"], fixed["V"]
    setting = Setting(spec, sizes, length, getattr(torch, DTYPE), offsets)
    leaves = [setting.hidden, *setting.head.parameters(), *setting.objective.parameters()]
    return (
        setting.step("plan" if name == "ours" else name),
        setting.clear,
        sum(leaf.nbytes for leaf in leaves),
    )


def _times(
    axis: str,
    fixed: Sizes,
    sizes: Sequence[int],
    names: Sequence[str],
    make: Callable[..., Made],
    rounds: int,
) -> Any:
    """Seconds by (name, size) in rounds that interleave all of them; by name the reason of one that
    cannot run."""
    runs: dict[Any, Callable[[], object]] = {}
    reasons: dict[Any, Any] = {}
    for name in names:
        for size in sizes:
            run, clear, _ = make(axis, fixed, size, name)
            try:
                run()
            except (ImportError, NotImplementedError) as error:
                reasons[name] = one_line(error)
                break
            runs[name, size] = _cleared(run, clear)
    return interleaved(runs, rounds) | reasons


def _cleared(run: Callable[[], object], clear: Callable[[], object]) -> Callable[[], object]:
    def step() -> None:
        clear()
        run()

    return step


def _extra_bytes(make: Callable[..., Made], axis: str, fixed: Sizes, size: int, name: str) -> int:
    run, clear, gradients = make(axis, fixed, size, name)
    return max(0, process_memory.peak_of(run, clear) - gradients)


def roofline(
    d: int, vocabulary: int, rows: Sequence[int], rounds: int, numbers: int
) -> dict[str, Any]:
    """Bandwidth of a copy, the best rate of the GEMMs, and GFLOP/s of the whole op at each
    arithmetic intensity."""
    op, dtype = OPS["linear_cross_entropy"], getattr(torch, DTYPE)
    source = torch.ones(numbers, dtype=dtype)
    into = torch.zeros_like(source)
    copy = interleaved({"copy": lambda: into.copy_(source)}, rounds)["copy"]
    points, best = [], 0.0
    for n in rows:
        sizes = {"N": n, "d": d, "V": vocabulary}
        inputs = op.inputs(sizes, dtype)
        steps = {name: cpu.Step(forward(op.name, name), inputs) for name in ("ours", "eager")}
        runs = {name: _cleared(each, inputs.clear) for name, each in steps.items()}
        h, w, _ = problem(n, d, vocabulary, dtype)
        times = interleaved(runs | gemms_of(h, w, multiplied, own), rounds)
        rates = {name: 1e-9 * op.flops(sizes) / statistics.median(times[name]) for name in runs}
        single = [
            2e-9 * n * d * vocabulary / statistics.median(times[name])
            for name in times
            if name not in runs
        ]
        best = max(best, *single)
        points.append(
            {
                "N": n,
                "intensity": op.flops(sizes) / op.least_bytes(sizes, dtype),
                "gflop_per_s": rates,
            }
        )
    bandwidth = 2e-9 * source.nbytes / statistics.median(copy)
    return {
        "d": d,
        "V": vocabulary,
        "dtype": DTYPE,
        "gb_per_s": bandwidth,
        "gflop_per_s": best,
        "points": points,
    }


def study(quick: bool, threads: int) -> dict[str, Any]:
    """Everything, as the JSON keeps it."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    sweeps = []
    for axis, (fixed, sizes) in (QUICK if quick else FULL).items():
        sweeps.append(sweep(axis, fixed, sizes, rounds, threads))
        print(sentence(sweeps[-1]), flush=True)
    errors = ERRORS[quick]
    lines = error_against_chunks(*errors, threads)
    roof = in_child(partial(roofline, *ROOFLINE[quick], rounds, COPY[quick]), threads, "raised")
    return {
        "machine": environment.machine(threads),
        "quick": quick,
        "study": "scaling",
        "sweeps": sweeps,
        "errors": {
            **dict(zip("NdV", errors[:3], strict=True)),
            "chunks": list(errors[3]),
            "lines": lines,
        },
        "roofline": roof,
    }


def sentence(found: dict[str, Any]) -> str:
    """The exponents of one sweep."""
    fixed = ", ".join(f"{key} = {value}" for key, value in found["fixed"].items())
    parts = [
        f"{name} time {found['axis']}^{each['time']:.2f}, memory "
        f"{found['axis']}^{each['memory']:.2f}"
        for name, each in found["exponents"].items()
    ]
    return f"{found['axis']} ({fixed}): {'; '.join(parts)}"


def run(options: argparse.Namespace) -> int:
    """Measure, print, write; 1 when the tests of the op are red."""
    if options.csv or options.markdown or options.html:
        print(
            "benchmarks: --case scaling writes --json and --save; `plot` makes the page",
            file=sys.stderr,
        )
        return 2
    info = environment.machine(options.threads)
    print(environment.machine_line(info), flush=True)
    if gate.refused(["linear_cross_entropy"]):
        return 1
    document = study(options.quick, options.threads)
    kept = storage.results_path(info, kind="-scaling") if options.save else None
    for path in (options.json, kept):
        if path:
            storage.write_json(path, document)
            print(f"written to {path}")
    return 0
