"""The cross-entropy's row kernel by blocks of a cluster and threads of a block: whether the plan
that is built in is the fastest on this GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import cpu, cuda, timing
from benchmarks.measure.isolated import At
from nitp_ops.kernels import select, table

SOURCE = Path(__file__).with_suffix(".cu")
LIBRARY = SOURCE.parents[1] / "build/geometry.so"
#: Of the plan that is built in.
CHOSEN = "chosen"
#: Blocks x threads.
NAMES = (
    CHOSEN,
    *(f"{blocks}x{threads}" for blocks in (1, 2, 4, 8) for threads in (128, 256, 512, 1024)),
)
KERNEL = "cross_entropy_rows_"


def sweep(
    at: At, names: list[str], *, sizes: dict[str, int], rounds: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Milliseconds by geometry, and over a copy of the same bytes; {"skipped": reason} where it
    does not run."""
    at(None)
    launched = launcher(built())
    make = table.all_kernels()[KERNEL].sample
    with cuda.DEVICE:
        call = make(sizes["N"], sizes["D"], torch.bfloat16)
        source = torch.randint(256, (call.moved // 2,), dtype=torch.uint8)
    copied = torch.empty_like(source)
    given = tuple(call.arguments[place] for place in (0, 1, 5, 6, 7, 8))  # see `launcher`
    runs: dict[str, Callable[[], object]] = {cpu.FLOOR: partial(copied.copy_, source)}
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        at(name)
        if name == CHOSEN:
            backend = select.select_backend(KERNEL, cuda.DEVICE, "native")
            runs[name] = partial(getattr(select.row_kernels(backend), KERNEL), *call.arguments)
        else:
            runs[name] = partial(launched, given, *map(int, name.split("x")))
        found[name] = cuda.attempt(name, lambda run=runs[name]: (run(), {})[1])
        if "skipped" in found[name]:
            del runs[name]
    at(None)
    times = cuda.timed(runs, call.restore, rounds, seconds)
    floor = times.pop(cpu.FLOOR)
    for name, values in times.items():
        found[name] |= {"milliseconds": timing.quartiles([1e3 * value for value in values])}
        found[name] |= {"times_floor": timing.ratios(values, floor)}
    return found


def built() -> Path:
    """The library, for the GPU that is here alone.

    Raises:
        ImportError: there is no nvcc, or it fails.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise ImportError("there is no nvcc on the PATH")
    LIBRARY.parent.mkdir(exist_ok=True)
    code = "sm_{}{}".format(*torch.cuda.get_device_capability())
    command = [
        nvcc,
        "-std=c++20",
        "-O3",
        "-shared",
        "-Xcompiler",
        "-fPIC",
        f"-arch={code}",
        str(SOURCE),
    ]
    done = subprocess.run(
        [*command, "-o", str(LIBRARY)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ImportError(f"nvcc: {(done.stderr.strip().splitlines() or ['failed'])[0]}")
    return LIBRARY


def launcher(library: Path) -> Callable[[tuple[Tensor, ...], int, int], None]:
    """launch((logits, labels, scale, stats, target logits, prediction), blocks, threads)."""
    function = ctypes.CDLL(str(library)).nitp_geometry
    function.restype = ctypes.c_char_p

    def launch(tensors: tuple[Tensor, ...], blocks: int, threads: int) -> None:
        logits = tensors[0]
        stream = torch.cuda.current_stream().cuda_stream if logits.is_cuda else None
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        numbers = [*map(ctypes.c_int64, logits.shape), ctypes.c_int(blocks), ctypes.c_int(threads)]
        reason = function(*pointers, *numbers, ctypes.c_void_p(stream))
        if reason:
            raise RuntimeError(reason.decode())

    return launch
