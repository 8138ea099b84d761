"""What docs/numerics.md is made of: time against the GEMMs, error against chunks, chunk sizes,
growth, roofline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import nitp_ops
from benchmarks.cases import OPS
from benchmarks.measure import children, cpu
from benchmarks.measure.gemm_times import (
    DTYPES,
    Sizes,
    faster,
    in_child,
    interleaved,
    medians,
    multiplied,
    own,
    ratio,
    served,
    widened,
)
from benchmarks.report.tables import markdown
from nitp_ops import reference

#: `multiplied` or `own` (measure/gemm_times.py).
Library = Callable[[str, Tensor, Tensor, Tensor], dict[str, Callable[[], object]]]


def problem(n: int, d: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    inputs = OPS["linear_cross_entropy"].inputs({"N": n, "d": d, "V": vocabulary}, dtype).arguments
    return inputs["hidden"], inputs["unembedding"], inputs["labels"]


def step(loss: Callable[[], Tensor], leaves: Sequence[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None
    loss().backward()


def gemms(
    h: Tensor, w: Tensor, library: Library, *others: Library
) -> dict[str, Callable[[], object]]:
    """The three GEMMs alone, by each of the libraries, into outputs that exist already."""
    h, w = h.detach(), w.detach()
    logits, d_h, d_w = h.new_empty(len(h), len(w)), torch.empty_like(h), torch.empty_like(w)
    calls = {"logits": (h, w.t(), logits), "dh": (logits, w, d_h), "dW": (logits.t(), h, d_w)}
    made = [each(gemm, *call) for gemm, call in calls.items() for each in (library, *others)]
    return {name: run for runs in made for name, run in runs.items()}


def time_shape(
    shape: tuple[int, int, int], dtype: torch.dtype, rounds: int
) -> dict[str, list[float]]:
    """Seconds in each round: the GEMMs (faster library; torch.mm), ours, ours with half the rows
    ignored, eager."""
    h, w, labels = problem(*shape, dtype)
    half = labels.clone()
    half[
        torch.randperm(len(half), generator=torch.Generator().manual_seed(3))[: len(half) // 2]
    ] = -100
    runs = gemms(h, w, multiplied)
    transposed, hidden = runs["mm dW"].args  # type: ignore[attr-defined]
    runs["fresh dW"] = lambda: torch.mm(transposed, hidden)
    runs["ours"] = partial(step, lambda: nitp_ops.linear_cross_entropy(h, w, labels), (h, w))
    runs["half"] = partial(step, lambda: nitp_ops.linear_cross_entropy(h, w, half), (h, w))
    eager = widened(h, w)
    runs["eager"] = partial(step, lambda: F.cross_entropy(F.linear(*eager), labels), eager)
    times = interleaved(runs, rounds)
    mm = [
        sum(each) for each in zip(*(times[f"mm {k}"] for k in ("logits", "dh", "dW")), strict=True)
    ]
    # what the op cannot spare: the gradient that it returns is new memory
    new = max(0.0, statistics.median(times["fresh dW"]) - statistics.median(times["mm dW"]))
    fast = faster(times)
    floors = {"gemms": fast, "new": [each + new for each in fast], "mm": mm}
    return {k: times[k] for k in ("ours", "half", "eager")} | floors


def reach(sizes: Sizes, threads: int) -> str:
    rows = []
    for shape in sizes["reach"]:
        n, d, v = shape
        for name, dtype in DTYPES.items():
            op, where = OPS["linear_cross_entropy"], {"N": n, "d": d, "V": v}
            # eager would multiply one by one, for minutes
            who = ("ours", "eager") if served(dtype) else ("ours",)
            peak = {
                k: in_child(partial(cpu.peak_memory, op, where, dtype, k), threads) for k in who
            }
            plan = nitp_ops.explain(
                "linear_cross_entropy", rows=n, width=d, vocabulary=v, dtype=dtype
            )
            extra = {k: (p["peak_bytes"] - p["gradient_bytes"]) / 2**20 for k, p in peak.items()}
            extra["ours"] -= plan.accumulator_bytes / 2**20
            for malloc in children.MALLOC:
                t = in_child(partial(time_shape, shape, dtype, sizes["rounds"]), threads, malloc)
                pairs = (
                    ("ours", "gemms"),
                    ("ours", "new"),
                    ("ours", "mm"),
                    ("eager", "gemms"),
                    ("half", "ours"),
                )
                ratios = [f"{ratio(t[a], t[b]):.2f}" for a, b in pairs]
                memory = [f"{extra[k]:.0f}" if k in extra else "-" for k in ("ours", "eager")]
                milliseconds = f"{1e3 * statistics.median(t['ours']):.0f}"
                rows.append([f"{n} x {d} x {v}", name, malloc, milliseconds, *ratios, *memory])
                print(rows[-1], flush=True)
    header = [
        "N x d x V",
        "dtype",
        "malloc",
        "ours, ms",
        "/ GEMMs",
        "/ with new dW",
        "/ torch.mm",
        "eager / GEMMs",
    ]
    return markdown([*header, "half ignored / all", "extra MiB", "eager's"], rows)


def error_against_chunks(
    n: int, d: int, v: int, counts: Sequence[int], threads: int
) -> dict[str, list[list[float]]]:
    """Relative errors of loss, dh and dW in bfloat16 against float64, a line for each number of
    chunks."""

    def task() -> dict[str, list[list[float]]]:
        h, w, labels = problem(n, d, v, torch.bfloat16)
        wide = [x.detach().double().requires_grad_() for x in (h, w)]

        def values(
            loss: Callable[[Tensor, Tensor], Tensor], leaves: Sequence[Tensor]
        ) -> list[Tensor]:
            value = loss(*leaves)
            return [x.detach().double() for x in (value, *torch.autograd.grad(value, leaves))]

        exact = values(lambda h, w: reference.linear_cross_entropy(h, w, labels), wide)

        def errors(loss: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
            pairs = zip(values(loss, (h, w)), exact, strict=True)
            return [float((a - b).norm() / b.norm()) for a, b in pairs]

        def ours(h: Tensor, w: Tensor, chunks: int) -> Tensor:
            return nitp_ops.linear_cross_entropy(h, w, labels, chunk_bytes=n // chunks * v * 2)

        def torchs(h: Tensor, w: Tensor, chunks: int) -> Tensor:
            options = torch.nn.LinearCrossEntropyOptions(
                batch_chunk_size=n // chunks, chunking_method=None
            )
            return F.linear_cross_entropy(h, w, labels, options=options)

        found = {"nitp_ops": [errors(partial(ours, chunks=c)) for c in counts]}
        if hasattr(F, "linear_cross_entropy"):
            found["F.linear_cross_entropy"] = [errors(partial(torchs, chunks=c)) for c in counts]
        return found | {
            "eager": [errors(lambda h, w: F.cross_entropy(F.linear(h, w), labels))] * len(counts)
        }

    return in_child(task, threads)


def chunk_sizes(sizes: Sizes, threads: int) -> str:
    n, d, v, mib = sizes["chunk"]

    def task(dtype: torch.dtype) -> dict[str, float]:
        h, w, labels = problem(n, d, v, dtype)

        def run(size: int | None) -> Callable[[], None]:
            loss = partial(nitp_ops.linear_cross_entropy, h, w, labels, chunk_bytes=size)
            return partial(step, loss, (h, w))

        runs: dict[str, Callable[[], object]] = {f"{m}": run(m * 2**20) for m in mib}
        runs["default"] = run(None)
        return medians(runs, min(2, sizes["rounds"]))

    times = {
        name: in_child(partial(task, dtype), threads, "raised") for name, dtype in DTYPES.items()
    }
    rows = [
        [name, *(f"{times[dtype][name] / times[dtype]['default']:.2f}" for dtype in DTYPES)]
        for name in times["float32"]
    ]
    return markdown(["chunk_bytes, MiB", *(f"{dtype}, time / default's" for dtype in DTYPES)], rows)


def parts(sizes: Sizes, threads: int) -> tuple[str, str, dict[str, dict[str, float]]]:
    """The row kernel by itself and the GEMMs by chunk size: what the roofline is made of."""
    numbers, vocabularies = sizes["kernel"]
    d, v, chunk_rows = sizes["gemm"]

    def kernel(dtype: torch.dtype) -> dict[int, float]:
        found = {}
        for vocabulary in vocabularies:
            n = max(1, numbers // vocabulary)
            logits, labels = (
                torch.randn(n, vocabulary).to(dtype),
                torch.zeros(n, 1, dtype=torch.int64),
            )
            stats, target, best = (
                torch.empty(2, n),
                torch.empty(n, 1),
                torch.empty(n, dtype=torch.int64),
            )
            times = []
            for _ in range(9):
                rows = logits.clone()
                start = time.perf_counter()
                torch.ops.nitp_ops.cross_entropy_rows_(
                    rows,
                    labels,
                    None,
                    None,
                    None,
                    None,
                    stats,
                    target,
                    best,
                    -100,
                    False,
                    0.0,
                    0.0,
                    0.0,
                    1.0,
                    True,
                )
                times.append(time.perf_counter() - start)
            found[vocabulary] = 1e9 * statistics.median(times) / (n * vocabulary)
        return found

    def rate(dtype: torch.dtype) -> dict[int, list[float]]:
        found = {}
        for n in chunk_rows:
            h, w, _ = problem(n, d, v, dtype)
            times = medians(gemms(h, w, multiplied, own), 5)
            found[n] = {name: 2e-9 * n * d * v / t for name, t in times.items()}
        return found

    kernels = {name: in_child(partial(kernel, dtype), threads) for name, dtype in DTYPES.items()}
    rates = {
        name: in_child(partial(rate, dtype), threads, "raised") for name, dtype in DTYPES.items()
    }
    columns = list(
        dict.fromkeys(k for by_n in rates.values() for each in by_n.values() for k in each)
    )
    rows = [
        [name, n, *(f"{each[k]:.0f}" if k in each else "-" for k in columns)]
        for name, by_n in rates.items()
        for n, each in by_n.items()
    ]
    roof = {
        name: {
            "kernel": statistics.median(kernels[name].values()),
            "rate": statistics.median(max(each.values()) for each in rates[name].values()),
        }
        for name in DTYPES
    }
    row_table = markdown(
        ["V", *(f"{name}, ns a logit" for name in DTYPES)],
        [[x, *(f"{kernels[name][x]:.2f}" for name in DTYPES)] for x in vocabularies],
    )
    return (
        row_table,
        markdown(["dtype", "rows a chunk", *(f"{k}, GFLOP/s" for k in columns)], rows),
        roof,
    )
