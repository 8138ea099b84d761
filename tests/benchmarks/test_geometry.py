"""What is timed by clusters and threads is the cross-entropy's kernel: the numbers of the op, on
the CPU."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.suites import geometry
from nitp_ops.kernels import table
from tests.benchmarks.gpu.cpu_in_its_place import stand_in

pytestmark = pytest.mark.gpu_source
ROOT = Path(__file__).resolve().parents[2]
SIZES = {"N": 3, "D": 3000}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The source of the GPU, compiled for the CPU (tests/kernels/cuda_source/simt)."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on the PATH: the CUDA kernels cannot be compiled for the CPU")
    out = tmp_path_factory.mktemp("geometry") / "geometry.so"
    sources = [
        str(ROOT / "benchmarks/suites/geometry.cu"),
        str(ROOT / "tests/kernels/cuda_source/simt/simt.cpp"),
    ]
    flags = [
        "-std=c++20",
        "-fPIC",
        "-shared",
        "-Wno-unknown-pragmas",
        f"-I{ROOT / 'tests/kernels/cuda_source/simt'}",
        "-x",
        "c++",
    ]
    done = subprocess.run(
        ["g++", *flags, *sources, "-o", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


def clusters(library, most):
    """How many blocks a cluster of the CPU's stand-in may have."""
    ctypes.CDLL(str(library)).simt_set(*map(ctypes.c_int64, (0, 227 * 1024, most, 1024)))


def test_every_geometry_gives_the_numbers_of_the_op(library):
    clusters(library, 8)
    launch = geometry.launcher(library)
    for name in geometry.NAMES[1:]:
        torch.manual_seed(0)
        call = table.all_kernels()[geometry.KERNEL].sample(SIZES["N"], SIZES["D"], torch.bfloat16)
        logits, labels, *_, scale, stats, picked, best = call.arguments[:9]
        mine = [torch.zeros_like(tensor) for tensor in (stats, picked, best)]
        overwritten = logits.clone()
        torch.ops.nitp_ops.cross_entropy_rows_(*call.arguments)
        launch((overwritten, labels, scale, *mine), *map(int, name.split("x")))
        torch.testing.assert_close(overwritten, logits, rtol=2e-2, atol=1e-5)
        for ours, theirs in zip(mine, (stats, picked, best), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_the_sweep_times_what_runs_and_says_why_the_rest_does_not(library, monkeypatch):
    stand_in(monkeypatch)
    clusters(library, 1)
    monkeypatch.setattr(geometry, "built", lambda: library)
    found = geometry.sweep(
        lambda name: None, ["chosen", "1x128", "2x128"], sizes=SIZES, rounds=2, seconds=9
    )
    assert (
        found["chosen"]["times_floor"]["median"] > 0
        and found["1x128"]["milliseconds"]["median"] > 0
    )
    assert "no such clusters" in found["2x128"]["skipped"]


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setattr(geometry.shutil, "which", lambda _: None)
    with pytest.raises(ImportError, match="no nvcc"):
        geometry.built()
