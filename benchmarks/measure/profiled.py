"""`python -m benchmarks.measure.profiled KERNEL`: one launch of a kernel under Nsight Compute, and
what it counted."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nitp_ops.kernels import select, table

from . import cuda
from .isolated import At

#: Kernel -> a part of the name that the profiler knows it by.
KERNELS = {
    "cross_entropy_rows_": "cross_entropy",
    "swiglu_rows strided": "swiglu",
    "weight gradient, beta = 1": "",
}
METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "multiprocessor_percent",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_percent",
    "smsp__inst_executed.sum": "warp_instructions",
    "launch__registers_per_thread": "registers",
}


#: Of the profiler, a start of torch and some replays.
SECONDS = 100


def calls(scale: int = 1) -> dict[str, Callable[[], Callable[[], object]]]:
    """Kernel -> what makes its inputs and returns one launch of it; scale divides the rows."""

    def row_kernel(name: str, arguments: tuple[Any, ...]) -> Callable[[], object]:
        chosen = select.select_backend(name, cuda.DEVICE, "native")
        return partial(getattr(select.row_kernels(chosen), name), *arguments)

    def cross_entropy() -> Callable[[], object]:
        make = table.all_kernels()["cross_entropy_rows_"].sample
        return row_kernel(
            "cross_entropy_rows_", make(4096 // scale, 128256 // scale, torch.bfloat16).arguments
        )

    # halves of one GEMM's output, as a fused gate and up leave them
    def swiglu() -> Callable[[], object]:
        both = torch.randn(8192 // scale, 2 * 5120).bfloat16()
        return row_kernel(
            "swiglu_rows", (*both.chunk(2, -1), torch.empty(len(both), 5120, dtype=torch.bfloat16))
        )

    def weight_gradient() -> Callable[[], object]:
        upstream, hidden = (
            torch.randn(8192 // scale, size // scale).bfloat16() for size in (128256, 4096)
        )
        total = torch.zeros(upstream.shape[1], hidden.shape[1], dtype=torch.bfloat16)
        return partial(torch.addmm, total, upstream.T, hidden, out=total)

    return dict(zip(KERNELS, (cross_entropy, swiglu, weight_gradient), strict=True))


def counters(at: At, names: list[str], *, kernel: str) -> dict[str, dict[str, Any]]:
    """What the profiler counted of one launch, under the one name."""
    (name,) = names
    at(None)
    if shutil.which("ncu") is None:
        return {name: {"skipped": "ImportError: ncu is not on the PATH"}}
    command = [
        "ncu",
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
        "--csv",
        "--metrics",
        ",".join(METRICS),
    ]
    command += [*(["-k", f"regex:{KERNELS[kernel]}"] if KERNELS[kernel] else []), "-c", "1"]
    command += [sys.executable, "-m", "benchmarks.measure.profiled", kernel]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    found = parsed(done.stdout)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return {name: found or {"skipped": f"ncu: {lines[-1].strip()[:160] if lines else 'no output'}"}}


def parsed(output: str) -> dict[str, Any]:
    """The counters in the CSV part of its output; {} where there are none."""
    lines = output.splitlines()
    first = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return {}
    found: dict[str, Any] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[first:]))):
        if row.get("Metric Name") in METRICS:
            found["kernel"] = row["Kernel Name"][:120]
            value = float(row["Metric Value"].replace(",", ""))
            found[METRICS[row["Metric Name"]]] = value * UNITS.get(row["Metric Unit"], 1)
    return found


#: To bytes and nanoseconds.
UNITS = {
    "Kbyte": 1e3,
    "Mbyte": 1e6,
    "Gbyte": 1e9,
    "us": 1e3,
    "usecond": 1e3,
    "ms": 1e6,
    "msecond": 1e6,
}


def main() -> int:
    (kernel,) = sys.argv[1:]
    with cuda.DEVICE:
        run = calls()[kernel]()
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
