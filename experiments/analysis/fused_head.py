"""Peak memory and time of the output head, eager and fused, each in a fresh process.

python -m experiments.analysis.fused_head fused 1024 256 151936 float32 cpu 2
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import nitp_ops
from benchmarks.measure.process_memory import resident_bytes

IMPLEMENTATIONS = ("eager", "fused")
PASSES = 3


@dataclass(frozen=True)
class HeadCost:
    """What one forward and backward pass of the head took."""

    implementation: str
    rows: int
    dim: int
    vocab: int
    dtype: str
    peak_bytes: int
    """Above the inputs; the gradients are in it."""
    seconds: float
    """The fastest of `PASSES` passes."""
    loss: float


def compare(
    rows: int, dim: int, vocab: int, dtype: str, device: str, threads: int
) -> list[HeadCost]:
    """The cost of each implementation on equal inputs, measured one after the other.

    Raises:
        RuntimeError: a measurement failed; the message is the last line that it printed.
    """
    return [
        _measure_afresh(name, rows, dim, vocab, dtype, device, threads) for name in IMPLEMENTATIONS
    ]


def _measure_afresh(name: str, *shape: int | str) -> HeadCost:
    command = [sys.executable, "-m", "experiments.analysis.fused_head", name, *map(str, shape)]
    done = subprocess.run(
        command,
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(
            f"the {name} head at {' x '.join(map(str, shape[:3]))} failed: {lines[-1]}"
        )
    return HeadCost(**json.loads(done.stdout))


def measure(name: str, rows: int, dim: int, vocab: int, dtype: str, device: str) -> HeadCost:
    """Run `name` here; the peak counts from the moment the inputs exist, so call it in a fresh
    process."""
    torch.manual_seed(0)
    working = getattr(torch, dtype)
    hidden = torch.empty(rows, dim, dtype=working, device=device).normal_().requires_grad_()
    matrix = (
        torch.empty(vocab, dim, dtype=working, device=device)
        .normal_(std=dim**-0.5)
        .requires_grad_()
    )
    labels = torch.randint(vocab, (rows,), device=device)
    before = peak_bytes(device)
    seconds, loss = [], torch.zeros(())
    peak = 0
    for index in range(PASSES):
        hidden.grad = matrix.grad = None
        start = time.perf_counter()
        if name == "eager":
            loss = F.cross_entropy(F.linear(hidden, matrix), labels)
        else:
            loss = nitp_ops.linear_cross_entropy(hidden, matrix, labels)
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if index == 0:
            peak = peak_bytes(device) - before
    return HeadCost(name, rows, dim, vocab, dtype, peak, min(seconds), loss.item())


def peak_bytes(device: str) -> int:
    """The most memory that this process ever held."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        # getrusage's ru_maxrss keeps the peak of the parent across exec; VmHWM starts afresh.
        return resident_bytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def main(arguments: Sequence[str]) -> None:
    """Measure as the arguments say and print the result as JSON."""
    name, rows, dim, vocab, dtype, device, threads = arguments
    torch.set_num_threads(int(threads))
    result = measure(name, int(rows), int(dim), int(vocab), dtype, device)
    print(json.dumps(result.__dict__))


if __name__ == "__main__":
    main(sys.argv[1:])
