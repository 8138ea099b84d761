"""Builds the CUDA row kernels for the CPU (tests/kernels/cuda_source/simt): torch.ops.nitp_simt,
the same schemas, on CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
#: All but the probe, which asks a driver.
KERNELS = sorted(path for path in (ROOT / "csrc/cuda").rglob("*.cu") if path.stem != "probe")
SOURCES = (
    ROOT / "csrc/schemas.cpp",
    ROOT / "csrc/cuda/register.cpp",
    ROOT / "tests/kernels/cuda_source/simt/simt.cpp",
    *KERNELS,
)
ORDERS = {"forward": 0, "backward": 1, "shuffled": 2}
H200_SHARED = 227 * 1024


def build(folder: Path, sanitize: bool = False) -> Path:
    """One library of all kernels, compiled by g++; `sanitize` so that a bad access or a misaligned
    one ends the run."""
    torch_folder = Path(torch.__file__).parent
    # of UndefinedBehaviorSanitizer what a kernel can do wrong: the whole of it takes three times as
    # long to compile
    kinds = "-fsanitize=address,alignment,bounds,shift,signed-integer-overflow"
    checks = [kinds, "-fno-sanitize-recover=all"] if sanitize else []
    # the schemas register as nitp_simt, so that nitp_ops itself can stand beside them
    flags = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wno-unknown-pragmas",
        '-DNITP_LIBRARY="nitp_simt"',
        *checks,
    ]
    flags += [
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-I{ROOT / 'tests/kernels/cuda_source/simt'}",
    ]

    def compiled(source: Path) -> str:
        out = folder / f"{source.name}.o"
        command = [
            "g++",
            *flags,
            "-isystem",
            str(torch_folder / "include"),
            "-x",
            "c++",
            "-c",
            str(source),
        ]
        done = subprocess.run(
            [*command, "-o", str(out)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return str(out)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, SOURCES))
    library = folder / "libnitp_simt.so"
    linked = ["-Wl,--no-as-needed", f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", "-shared", *checks, *objects, "-o", str(library), *linked], check=True)
    return library


@functools.cache
def simt() -> ctypes.CDLL:
    """The library, built once a process and loaded into torch.ops.nitp_simt."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on the PATH: the CUDA kernels cannot be compiled for the CPU")
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        torch.ops.load_library(str(library))
        return ctypes.CDLL(str(library))


def choose(
    order: str = "forward", shared_bytes: int = H200_SHARED, cluster: int = 1, threads: int = 1024
) -> None:
    """In which order threads and blocks run, and what a block and a cluster may have."""
    simt().simt_set(*map(ctypes.c_int64, (ORDERS[order], shared_bytes, cluster, threads)))


def last_cluster() -> int:
    """How many blocks the clusters of the last launch had; 1: no clusters."""
    return simt().simt_last_cluster()


def placed(values: torch.Tensor, offset: int, stride: int) -> torch.Tensor:
    """The same rows, `offset` elements after an aligned address and `stride` >= columns apart; NaN
    between them."""
    rows, columns = values.shape
    memory = torch.full((offset + rows * stride + 16,), float("nan"), dtype=values.dtype)
    view = memory[offset:].as_strided((rows, columns), (stride, 1), offset)
    view.copy_(values)
    return view


def untouched(view: torch.Tensor) -> bool:
    """Whether everything around the rows of a `placed` tensor is still NaN."""
    memory = view.new_empty(0).set_(view.untyped_storage()).clone()
    memory.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(float("nan"))
    return bool(memory.isnan().all())
