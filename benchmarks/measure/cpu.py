"""How it is measured: child processes, interleaved rounds, peak memory, error against float64.

Each measurement runs in a child forked from a parent that has imported torch and computed nothing, so that it starts
with a clean heap, no thread pool, and no import to wait for.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

# Loaded here, once, instead of in every child: the first custom op of a process imports torch._dynamo (1 to 2 s), the
# first compilation the rest.
import torch._dynamo
import torch._inductor.compile_fx

from benchmarks.cases import Forward, Inputs, Op, Sizes
from benchmarks.implementations import forward, step
from nitp_ops import reference

from .isolated import MeasurementError, one_line

T = TypeVar("T")

FLOOR = "floor"
MALLOC = {
    "default": "glibc as it comes: blocks over 32 MiB are mapped afresh, and every page faults, at each allocation",
    "raised": "mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1): freed blocks stay mapped",
}
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def in_child(task: Callable[[], T]) -> T:
    """Run `task` in a forked child and return its (picklable) result.

    Raises:
        MeasurementError: the task raised, or the child died.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(task, sender))
    child.start()
    sender.close()
    try:
        succeeded, result = receiver.recv()
    except EOFError:
        child.join()
        raise MeasurementError(f"the process ended with code {child.exitcode} before it had a result") from None
    finally:
        receiver.close()
    child.join()
    if not succeeded:
        raise MeasurementError(result)
    return result


def _send(task: Callable[[], Any], sender: Connection) -> None:
    # Ctrl-C reaches parent and child alike; the parent is the one that says so.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        sender.send((True, task()))
    except Exception as error:
        sender.send((False, one_line(error)))


def configure(threads: int, malloc: str = "default") -> None:
    """Threads and allocator of this process."""
    torch.set_num_threads(threads)
    if malloc == "raised":
        libc = ctypes.CDLL(None)
        if not (libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1)):
            raise OSError("mallopt refused the setting")


def interleave(
    runs: Mapping[str, Callable[[], object]],
    prepare: Callable[[], None],
    *,
    rounds: int,
    seconds: float,
    clock: Callable[[], Any] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run in each round (the difference of two readings of `clock`).

    Every round starts with another and every second one goes backwards: what a run finds in caches and in freed memory
    is not always left by the same one. A run leaves after the round in which its own total passes `seconds`, and has at
    least one time.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for turn in range(rounds):
        step = -1 if turn % 2 else 1
        for name in (order[(turn + step * place) % len(order)] for place in range(len(order))):
            if sum(times[name]) > seconds:
                continue
            prepare()
            start = clock()
            runs[name]()
            times[name].append(clock() - start)
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return {"median": values[0], "q25": values[0], "q75": values[0]}
    q25, median, q75 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q25": q25, "q75": q75}


def ratios(times: list[float], base: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios within each round, which drifts of the machine's speed cancel from."""
    return spread([a / b for a, b in zip(times, base, strict=False)])


class Step:
    """Forward and backward of one implementation; `moments` are readings of `clock` before and after each forward."""

    def __init__(self, function: Forward, inputs: Inputs, clock: Callable[[], Any] = time.perf_counter) -> None:
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
    """Medians, quartiles, ratios within rounds and the rate of the products beside what is known already."""
    for name, values in times.items():
        row = results[name]
        row |= {"milliseconds": _milliseconds(values), "rounds": len(values)}
        row["times_floor"] = ratios(values, times[FLOOR])
        if "eager" in times:
            row["times_eager"] = ratios(values, times["eager"])
        if isinstance(run := runs.get(name), Step):
            forwards = [after - before for before, after in run.moments[-len(values) :]]
            row["forward_ms"] = _milliseconds(forwards)
            row["backward_ms"] = _milliseconds([max(0.0, a - b) for a, b in zip(values, forwards, strict=True)])
        if flops:
            row["gflop_per_s"] = 1e-6 * flops / row["milliseconds"]["median"]
    return results


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    return spread([1e3 * value for value in seconds])


def time_case(
    op: Op, sizes: Sizes, dtype: torch.dtype, names: list[str], *, rounds: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Interleaved times of the floor and of each implementation; {"skipped": reason} where one cannot run."""
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
    """Bytes that the second step needs above what is resident before it, the gradients that it returns included.

    The first step takes what is needed once (thread pool, primitives, compilation). `VmHWM` is reset and read instead
    of `ru_maxrss`, which cannot be reset and which exec carries over from the parent.
    """
    inputs = op.inputs(sizes, dtype)
    function = forward(op.name, name)
    peak = peak_of(lambda: step(function, inputs), inputs.clear)
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in inputs.leaves.values())
    return {"peak_bytes": peak, "gradient_bytes": gradients}


def peak_of(run: Callable[[], object], clear: Callable[[], object]) -> int:
    """Most bytes resident in a second run above those before it; `clear` drops what the first left."""
    run()
    clear()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    run()
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


#: Words of the vocabulary that the float64 check takes: DeepSeek-V3's matrix and its gradient are 15 GB in float64.
ERROR_WORDS = 32768


def errors(op: Op, sizes: Sizes, dtype: torch.dtype, names: list[str]) -> dict[str, dict[str, float]]:
    """|x - x64| / |x64| (Frobenius) of the value and of each gradient, x64 from the float64 reference."""
    sizes = {**sizes, "N": min(sizes["N"], op.error_rows)}
    if "V" in sizes:
        sizes["V"] = min(sizes["V"], ERROR_WORDS)
    inputs = op.inputs(sizes, dtype)
    exact = value_and_gradients(getattr(reference, op.name), inputs.to(torch.float64))
    return {name: relative(value_and_gradients(forward(op.name, name), inputs), exact) for name in names}


def lacking(op: Op, sizes: Sizes, dtype: torch.dtype, available: int) -> str | None:
    """Why a case does not fit into `available` bytes, or None where it does.

    The inputs and the floor's are there twice, gradients beside them, a float32 sum of the weight's; eager in float32
    holds three times the logits.
    """
    need = 2 * op.least_bytes(sizes, dtype)
    if "V" in sizes:
        need += 4 * sizes["V"] * (sizes["d"] + 3 * sizes["N"])
    if need <= available:
        return None
    return f"needs {need / 2**30:.1f} GiB, {available / 2**30:.1f} are available"


def available_bytes() -> int:
    """What the kernel thinks a process can still take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def relative(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """|x - x64| / |x64| (Frobenius) of each part."""
    return {part: float((x.double() - exact[part]).norm() / exact[part].norm()) for part, x in found.items()}


def value_and_gradients(function: Callable[..., torch.Tensor], inputs: Inputs) -> dict[str, torch.Tensor]:
    """The result of one step under the name "value", and the gradient of each leaf."""
    inputs.clear()
    results = {"value": step(function, inputs)}
    for name, leaf in inputs.leaves.items():
        if leaf.grad is None:
            raise RuntimeError(f"{name} got no gradient")
        results[f"gradient of {name}"] = leaf.grad
    return results
