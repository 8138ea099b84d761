"""How an op is measured on a CPU: time in turns with others, peak memory, error against float64."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.cases import Forward, Inputs, Op, Sizes
from benchmarks.implementations import forward, step
from nitp_ops import reference

from .isolated import one_line
from .process_memory import peak_of
from .timing import interleave, quartiles, ratios

FLOOR = "floor"


class Step:
    """Forward and backward of one implementation; `moments` are readings of `clock` before and
    after each forward."""

    def __init__(
        self, function: Forward, inputs: Inputs, clock: Callable[[], Any] = time.perf_counter
    ) -> None:
        self.function, self.inputs, self.clock = function, inputs, clock
        self.moments: list[tuple[Any, Any]] = []

    def __call__(self) -> None:
        start = self.clock()
        value = self.inputs.forward(self.function)
        self.moments.append((start, self.clock()))
        value.backward(self.inputs.upstream)


def described(
    results: dict[str, dict[str, Any]],
    times: dict[str, list[float]],
    runs: Mapping[str, Callable[[], object]],
    flops: int = 0,
) -> dict[str, dict[str, Any]]:
    """Medians, quartiles, ratios within rounds and the rate of the GEMMs beside what is known
    already."""
    for name, values in times.items():
        row = results[name]
        row |= {"milliseconds": _milliseconds(values), "rounds": len(values)}
        row["times_floor"] = ratios(values, times[FLOOR])
        if "eager" in times:
            row["times_eager"] = ratios(values, times["eager"])
        if isinstance(run := runs.get(name), Step):
            forwards = [after - before for before, after in run.moments[-len(values) :]]
            row["forward_ms"] = _milliseconds(forwards)
            row["backward_ms"] = _milliseconds(
                [max(0.0, a - b) for a, b in zip(values, forwards, strict=True)]
            )
        if flops:
            row["gflop_per_s"] = 1e-6 * flops / row["milliseconds"]["median"]
    return results


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    return quartiles([1e3 * value for value in seconds])


def time_case(
    op: Op, sizes: Sizes, dtype: torch.dtype, names: list[str], *, rounds: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Interleaved times of the floor and of each implementation; {"skipped": reason} where one
    cannot run."""
    inputs = op.inputs(sizes, dtype)
    runs: dict[str, Callable[[], object]] = {FLOOR: op.floor(sizes, dtype)}
    results: dict[str, dict[str, Any]] = {FLOOR: {}}
    for name in names:
        start = time.perf_counter()
        try:
            run = Step(forward(op.name, name), inputs)
            run()
        except Exception as error:
            results[name] = {"skipped": one_line(error)}
            inputs.clear()
            continue
        first = time.perf_counter() - start
        results[name] = {"first_call_s": first}
        runs[name] = run
        inputs.clear()
        if first < seconds:  # one that takes longer is timed once: a warm-up would double its cost
            run()
    runs[FLOOR]()
    gc.collect()
    gc.disable()
    times = interleave(runs, inputs.clear, rounds=rounds, seconds=seconds)
    return described(results, times, runs, op.flops(sizes))


def peak_memory(op: Op, sizes: Sizes, dtype: torch.dtype, name: str) -> dict[str, int]:
    """Bytes that the second step needs above what is resident before it, the gradients that it
    returns included.

    The first step takes what is needed once (thread pool, primitives, compilation). `VmHWM` is
    reset and read instead of `ru_maxrss`, which cannot be reset and which exec carries over from
    the parent.
    """
    inputs = op.inputs(sizes, dtype)
    function = forward(op.name, name)
    peak = peak_of(lambda: step(function, inputs), inputs.clear)
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in inputs.leaves.values())
    return {"peak_bytes": peak, "gradient_bytes": gradients}


#: Words of the vocabulary that the float64 check takes: DeepSeek-V3's matrix and its gradient are
#: 15 GB in float64.
ERROR_WORDS = 32768


def errors(
    op: Op, sizes: Sizes, dtype: torch.dtype, names: list[str]
) -> dict[str, dict[str, float]]:
    """|x - x64| / |x64| (Frobenius) of the value and of each gradient, x64 from the float64
    reference."""
    sizes = {**sizes, "N": min(sizes["N"], op.error_rows)}
    if "V" in sizes:
        sizes["V"] = min(sizes["V"], ERROR_WORDS)
    inputs = op.inputs(sizes, dtype)
    exact = value_and_gradients(getattr(reference, op.name), inputs.to(torch.float64))
    return {
        name: relative(value_and_gradients(forward(op.name, name), inputs), exact) for name in names
    }


def lacking(op: Op, sizes: Sizes, dtype: torch.dtype, available: int) -> str | None:
    """Why a case does not fit into `available` bytes, or None where it does.

    The inputs and the floor's are there twice, gradients beside them, a float32 sum of the
    weight's; eager in float32 holds three times the logits.
    """
    need = 2 * op.least_bytes(sizes, dtype)
    if "V" in sizes:
        need += 4 * sizes["V"] * (sizes["d"] + 3 * sizes["N"])
    if need <= available:
        return None
    return f"needs {need / 2**30:.1f} GiB, {available / 2**30:.1f} are available"


def relative(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """|x - x64| / |x64| (Frobenius) of each part."""
    return {
        part: float((x.double() - exact[part]).norm() / exact[part].norm())
        for part, x in found.items()
    }


def value_and_gradients(
    function: Callable[..., torch.Tensor], inputs: Inputs
) -> dict[str, torch.Tensor]:
    """The result of one step under the name "value", and the gradient of each leaf."""
    inputs.clear()
    results = {"value": step(function, inputs)}
    for name, leaf in inputs.leaves.items():
        if leaf.grad is None:
            raise RuntimeError(f"{name} got no gradient")
        results[f"gradient of {name}"] = leaf.grad
    return results
