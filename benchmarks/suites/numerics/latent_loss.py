"""What docs/implicit-numerics.md is made of: implicit_token_loss against its GEMMs, its memory, its
row kernels."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import nitp_ops
from benchmarks.cases import OPS
from benchmarks.implementations import forward, step
from benchmarks.measure import cpu
from benchmarks.measure.gemm_times import (
    DTYPES,
    Sizes,
    faster,
    in_child,
    interleaved,
    multiplied,
    ratio,
    served,
)
from benchmarks.report import environment
from benchmarks.report.tables import markdown

FULL: Sizes = {
    "reach": [(4096, 512), (4096, 896), (2048, 2048)],
    "rounds": 5,
    "memory": (512, (1024, 4096, 16384, 65536)),
    "alignment": [(8192, 1024), (8192, 2048), (8192, 4096)],
    "swiglu": (8192, 4096),
}
TOY: Sizes = {
    "reach": [(8, 4)],
    "rounds": 2,
    "memory": (4, (8, 16)),
    "alignment": [(8, 4)],
    "swiglu": (8, 4),
}


def page(sizes: Sizes, threads: int) -> str:
    memory, exponents = peaks(sizes, threads)
    return f"""# Numbers of implicit_token_loss

Written by `python -m benchmarks.suites.numerics --only latent`; nothing here is typed by hand.
Machine: {environment.machine_line(environment.machine(threads))}.

## Time

Forward and backward (cosine, SwiGLU projector, m = 4 d) against the nine GEMMs alone (three of each projection,
outputs that exist already), each by the faster of torch.mm and, in float32, oneDNN (into new memory on processors
without AVX-512); the same for the formula in PyTorch and for torch.compile of it. Where no library has GEMMs of
bfloat16, those of float32 stand for them, and the formula is left out. Medians of the ratios within
{sizes["rounds"]} interleaved rounds, freed memory kept ("raised").

{reach(sizes, threads)}

## Memory

MiB at the peak of a fresh process's second step, beyond the gradients and the float32 accumulators;
d = {sizes["memory"][0]}, so what grows with N in ours is the gradient of the hidden state alone, which is not counted.
Fitted growth from the first to the last N: {exponents}.

{memory}

## Row kernels

Forward and backward over a workspace that is reused, against a copy of the same bytes (alignment 5 N D numbers, SwiGLU
8 N m). In bfloat16 a copy moves half the bytes of float32, but the arithmetic is the same: where the ratio rises from
float32 to bfloat16 the kernel is bound by exponentials, divisions and roundings, not by memory.

{row_kernels(sizes, threads)}
"""


def time_shape(shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    """Seconds in each round: the nine GEMMs by the faster library, ours, eager, torch.compile;
    those last two not where torch.mm would multiply one by one, for minutes."""
    n, d = shape
    op = OPS["implicit_token_loss"]
    inputs = op.inputs({"N": n, "d": d}, dtype)
    floors: dict[str, Callable[[], object]] = {}
    for name, rows, k, m in (("gate", n, d, 4 * d), ("up", n, d, 4 * d), ("down", n, 4 * d, d)):
        x, weight = torch.randn(rows, k).to(dtype), torch.randn(m, k).mul_(k**-0.5).to(dtype)
        out, d_x, d_w = (
            torch.empty(rows, m, dtype=dtype),
            torch.empty_like(x),
            torch.empty_like(weight),
        )
        for part, call in (
            ("y", (x, weight.t(), out)),
            ("dx", (out, weight, d_x)),
            ("dW", (out.t(), x, d_w)),
        ):
            floors |= multiplied(f"{name} {part}", *call)

    def run(name: str) -> Callable[[], object]:
        function = forward(op.name, name)

        def once() -> None:
            inputs.clear()
            step(function, inputs)

        return once

    who = ("ours", "eager", "compile") if served(dtype) else ("ours",)
    times = interleaved(floors | {name: run(name) for name in who}, rounds)
    return {name: times[name] for name in who} | {"gemms": faster(times)}


def reach(sizes: Sizes, threads: int) -> str:
    rows = []
    for shape in sizes["reach"]:
        for name, dtype in DTYPES.items():
            t = in_child(partial(time_shape, shape, dtype, sizes["rounds"]), threads, "raised")
            whose = ("ours", "eager", "compile")
            ratios = [f"{ratio(t[who], t['gemms']):.2f}" if who in t else "-" for who in whose]
            rows.append(
                [
                    f"{shape[0]} x {shape[1]}",
                    name,
                    f"{1e3 * statistics.median(t['ours']):.0f}",
                    *ratios,
                ]
            )
            print(rows[-1], flush=True)
    header = ["N x d", "dtype", "ours, ms", "ours / GEMMs", "eager / GEMMs", "compile / GEMMs"]
    return markdown(header, rows)


def peaks(sizes: Sizes, threads: int) -> tuple[str, str]:
    """The table, and how both grow."""
    d, counts = sizes["memory"]
    extra: dict[str, dict[str, list[float]]] = {}
    for name, dtype in DTYPES.items():
        plan = nitp_ops.explain(
            "implicit_token_loss", rows=counts[-1], width=d, inner=4 * d, dtype=dtype
        )
        extra[name] = {"ours": [], "eager": []} if served(dtype) else {"ours": []}
        for n in counts:
            for who in extra[name]:
                task = partial(
                    cpu.peak_memory, OPS["implicit_token_loss"], {"N": n, "d": d}, dtype, who
                )
                found = in_child(task, threads)
                own = (
                    found["peak_bytes"]
                    - found["gradient_bytes"]
                    - (plan.accumulator_bytes if who == "ours" else 0)
                )
                extra[name][who].append(max(own, 2**20) / 2**20)
    rows = [
        [n, *(f"{values[place]:.0f}" for each in extra.values() for values in each.values())]
        for place, n in enumerate(counts)
    ]
    header = ["N", *(f"{name}, {who}" for name, each in extra.items() for who in each)]
    slopes = [
        f"{who} N^{math.log(values[-1] / values[0]) / math.log(counts[-1] / counts[0]):.2f} in "
        f"{name}"
        for name, each in extra.items()
        for who, values in each.items()
    ]
    return markdown(header, rows), ", ".join(slopes)


def row_kernels(sizes: Sizes, threads: int) -> str:
    def alignment(n: int, width: int, dtype: torch.dtype) -> dict[str, float]:
        p, z, d_p = (torch.randn(n, width).to(dtype) for _ in range(3))
        stats, scale = torch.empty(4, n), torch.ones(n)
        kernel = torch.ops.nitp_ops.alignment_rows_

        def run() -> None:
            for into, gradient in ((None, False), (d_p, True)):
                kernel(p, z, None, scale, stats, into, None, 0, 1e-6, gradient)

        return against_copy(run, 5 * n * width, dtype)

    def swiglu(n: int, width: int, dtype: torch.dtype) -> dict[str, float]:
        gate, up, upstream, out, d_gate, d_up = (torch.randn(n, width).to(dtype) for _ in range(6))

        def run() -> None:
            torch.ops.nitp_ops.swiglu_rows(gate, up, out)
            torch.ops.nitp_ops.swiglu_rows_backward_(gate, up, upstream, d_gate, d_up)

        return against_copy(run, 8 * n * width, dtype)

    def against_copy(
        run: Callable[[], object], numbers: int, dtype: torch.dtype
    ) -> dict[str, float]:
        source: Tensor = torch.ones(numbers // 2, dtype=dtype)
        into = torch.zeros_like(source)
        times = interleaved(
            {"copy": lambda: into.copy_(source), "kernel": run}, 2 * sizes["rounds"]
        )
        return {
            "ms": 1e3 * statistics.median(times["kernel"]),
            "ratio": ratio(times["kernel"], times["copy"]),
        }

    cases = [("alignment", alignment, shape) for shape in sizes["alignment"]] + [
        ("swiglu", swiglu, sizes["swiglu"])
    ]
    rows = []
    for name, task, shape in cases:
        found = [in_child(partial(task, *shape, dtype), threads) for dtype in DTYPES.values()]
        cells = [cell for x in found for cell in (f"{x['ms']:.1f}", f"{x['ratio']:.2f}")]
        rows.append([f"{name} {shape[0]} x {shape[1]}", *cells])
        print(rows[-1], flush=True)
    return markdown(
        ["kernel", *(cell for name in DTYPES for cell in (f"{name}, ms", "of a copy"))], rows
    )
