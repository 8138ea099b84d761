"""How an op is measured on a GPU: events around work that the host has queued, cold caches, every
row against float64.

One case runs in one fresh process (`isolated`), which these functions are called in.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import OPS, Inputs, Layers, Op, Sizes, gemms
from benchmarks.implementations import forward as function_of
from benchmarks.implementations import step
from nitp_ops import reference

from . import cpu, timing
from .isolated import At, Lost, one_line

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DEVICE = torch.device("cuda")
#: Written before every run, as often as needed (`flushes`): the inputs leave the L2 cache (50 MB on
#: an H100), and while the writes last the host queues the run, so that its launches are not what is
#: timed. One write was too short: an alignment that takes 0.9 ms seemed to take 1.4.
FLUSH_BYTES = 2**31
#: Seconds that the writes last: these at least (what held on an H100), at most those, between them
#: LEAD times what the slowest run takes the host. A run that waits for the device itself would ask
#: for more.
HIDDEN, LONGEST, LEAD = 6e-3, 20e-3, 2.0
# One process measures every case, and each is a compilation of the same function: behind the limit
# dynamo would run the function as it is, and its time would stand under "compile".
torch._dynamo.config.recompile_limit = 64
#: Rows a chunk of the float64 cross-entropy: 2.5 GB of logits at a vocabulary of 151936.
EXACT_ROWS = 2048


class Instant:
    """A moment of the current stream; the difference of two waits for them and is in seconds."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Instant) -> float:
        self.event.synchronize()
        return 1e-3 * earlier.event.elapsed_time(self.event)


def settle() -> None:
    """Wait for the device, and give back what Python no longer holds."""
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()


def measure_case(
    at: At, names: list[str], *, op: str, sizes: Sizes, dtype: str, rounds: int, seconds: float
) -> Any:
    """Rows by name: the floor and the implementations, {"skipped": reason} where one cannot run."""
    chosen, number = OPS[op], DTYPES[dtype]
    with DEVICE:
        inputs, floor = chosen.inputs(sizes, number), floor_of(chosen, sizes, number)
    exact = exact_values(chosen, inputs)
    results: dict[str, dict[str, Any]] = {cpu.FLOOR: {}}
    runs: dict[str, Callable[[], object]] = {}
    for name in names:
        at(name)
        results[name] = attempt(name, partial(first_steps, chosen, name, inputs, exact))
        inputs.clear()
        if "skipped" not in results[name]:
            runs[name] = cpu.Step(function_of(op, name), inputs, Instant)
    del exact
    at(None)
    times = timed(floor | runs, inputs.clear, rounds, seconds)
    forms = {form: times.pop(form) for form in floor}
    results[cpu.FLOOR] |= {
        "forms_ms": {form: 1e3 * statistics.median(values) for form, values in forms.items()}
    }
    times[cpu.FLOOR] = min(forms.values(), key=statistics.median)
    return cpu.described(results, times, runs, chosen.flops(sizes))


def attempt(name: str, task: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `task`, or {"skipped": reason}.

    Raises:
        Lost: the device answers nothing any more (an illegal access, say): the process is of no
            further use.
    """
    try:
        result = task()
        settle()
        return result
    except Exception as error:
        reason = one_line(error)
    try:
        settle()
    except RuntimeError:
        raise Lost(f"{name} broke the device: {reason}") from None
    return {"skipped": reason}


def first_steps(op: Op, name: str, inputs: Inputs, exact: dict[str, Tensor]) -> dict[str, Any]:
    """Seconds of the first step, error of its results, peak memory of the next."""
    start = time.perf_counter()
    function = function_of(op.name, name)
    values = cpu.value_and_gradients(function, inputs)
    torch.cuda.synchronize()
    row: dict[str, Any] = {"first_call_s": time.perf_counter() - start}
    row["error"] = cpu.relative(values, exact)
    wrong = [part for part, error in row["error"].items() if not error < 1]
    if wrong:
        raise ArithmeticError(f"{wrong[0]} is wrong: relative error {row['error'][wrong[0]]:.1e}")
    del values
    return row | peak_memory(partial(step, function, inputs), inputs)


def peak_memory(run: Callable[[], object], inputs: Inputs) -> dict[str, int]:
    """Bytes that one step needs beyond what is allocated before it, the gradients that it returns
    included."""
    inputs.clear()
    settle()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in inputs.leaves.values())
    return {"peak_bytes": torch.cuda.max_memory_allocated() - before, "gradient_bytes": gradients}


def exact_values(op: Op, inputs: Inputs) -> dict[str, Tensor]:
    """Value and gradients of every row in float64, the logits of EXACT_ROWS rows at a time."""
    wide = inputs.to(torch.float64)
    if op.name != "linear_cross_entropy":
        return cpu.value_and_gradients(getattr(reference, op.name), wide)
    hidden, unembedding, labels = (
        wide.arguments[name] for name in ("hidden", "unembedding", "labels")
    )
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for first in range(0, len(labels), EXACT_ROWS):
        part = slice(first, first + EXACT_ROWS)
        loss = reference.linear_cross_entropy(
            hidden[part], unembedding, labels[part], normalizer=len(labels), **wide.options
        )
        loss.backward()
        total += loss.detach()
    gradients = {f"gradient of {name}": leaf.grad for name, leaf in wide.leaves.items()}
    return {"value": total} | {
        name: gradient for name, gradient in gradients.items() if gradient is not None
    }


def floor_of(op: Op, sizes: Sizes, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The floor by the form of its weight gradients: every GEMM of the op, one after the other,
    with their output in the working dtype and, where the device can, in float32; or one copy.

    One after the other, as the op runs them: a GEMM alone, behind idle time, has the higher clock
    to itself."""
    if op.layers is None:
        return {"copy": op.floor(sizes, dtype)}
    return product_runs(op.layers(sizes), dtype)


def product_runs(layers: Layers, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    calls = gemms(layers, dtype)

    def run(wide: bool) -> None:
        for place, (left, right, out) in enumerate(calls):
            if wide and place % 3 == 2:
                torch.mm(left, right, out_dtype=torch.float32)
            else:
                torch.mm(left, right, out=out)

    runs: dict[str, Callable[[], object]] = {str(dtype).removeprefix("torch."): partial(run, False)}
    if dtype != torch.float32 and widens(*calls[2][:2]):
        runs["float32"] = partial(run, True)
    return runs


def widens(left: Tensor, right: Tensor) -> bool:
    """Whether this device forms a float32 GEMM of narrower factors."""
    try:
        torch.mm(left[:8, :8], right[:8, :8], out_dtype=torch.float32)
    except (NotImplementedError, RuntimeError):
        return False
    return True


def timed(
    runs: dict[str, Callable[[], object]],
    prepare: Callable[[], object],
    rounds: int,
    seconds: float,
) -> dict[str, list[float]]:
    """Seconds of each run in interleaved rounds, each warmed up, each behind writes that hide the
    host."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)

    def ready(count: int) -> None:
        prepare()
        for _ in range(count):
            flush.zero_()

    host = 0.0
    for run in runs.values():
        ready(1)
        run()  # compiles, and sets up its libraries
        ready(1)
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        host = max(host, time.perf_counter() - start)
        torch.cuda.synchronize()
    prepared = partial(ready, flushes(host, seconds_of(flush.zero_)))
    gc.collect()
    gc.disable()  # a collection in the middle of a run would be timed
    try:
        return timing.interleave(runs, prepared, rounds=rounds, seconds=seconds, clock=Instant)
    finally:
        gc.enable()


def flushes(host: float, each: float) -> int:
    """How many writes of `each` seconds hide `host` seconds of queueing."""
    return max(1, math.ceil(min(max(HIDDEN, LEAD * host), LONGEST) / each))


def seconds_of(run: Callable[[], object], times: int = 4) -> float:
    """Seconds on the device of one of several runs in a row, after a warm-up."""
    run()
    start = Instant()
    for _ in range(times):
        run()
    return max(1e-9, Instant() - start) / times
