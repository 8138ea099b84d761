"""The wheel for every Linux and Python: what its library needs, and that its exceptions arrive."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

import tests.packaging.package_cases as cases
from tests.packaging import wheel_facts
from tests.packaging.package_cases import compiled, environment, install, path_without, run
from tests.support.processor import HAS_OWN_GEMM, SETS

ROOT = Path(__file__).parents[2]
# zig builds its own C library the first time
pytestmark = [pytest.mark.package, pytest.mark.timeout(900)]

CHOSEN = "from nitp_ops.core import library; print(library.instruction_set(), library.has_gemm())"
THROWN = """
import torch, nitp_ops
rows = torch.randn(2, 8)
try:
    torch.ops.nitp_ops.swiglu_rows(rows, rows[:, :4], rows)
except RuntimeError as error:
    print("caught", error)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("portable")
    clone, path = cases.sources(folder), path_without(folder, "nvcc")
    command = (
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--config-setting",
        "portable=true",
        "--outdir",
        folder,
        clone,
    )
    run(*command, cwd=folder, PATH=path)
    return next(folder.glob("*.whl"))


def test_the_wheel_is_for_any_linux_and_any_python(wheel):
    facts = wheel_facts.read(wheel)
    assert not wheel_facts.faults(facts) and facts.kind == "cpu"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"size": 3_000_001}, "3.00 MB, at most 3"),
        ({"kind": "cuda", "size": 6_000_001}, "6.00 MB, at most 6"),
        ({"tag": "cp311-cp311-linux_x86_64"}, "tag cp311-cp311-linux_x86_64"),
        ({"purelib": "true"}, "Root-Is-Purelib is true"),
        ({"policy": (2, 34)}, "needs glibc (2, 34)"),
        (
            {"exported": frozenset({"nitp_ops_has_gemm", "_ZNSt6vector"})},
            "exports ['_ZNSt6vector', 'nitp_ops_has_gemm']",
        ),
        (
            {"undefined": frozenset({"cudaGetDevice"})},
            "takes names of CUDA or OpenMP when it loads",
        ),
        ({"undefined": frozenset({"aoti_torch_new"})}, "calls ['aoti_torch_new'] of torch"),
        ({"needed": wheel_facts.RUNTIMES | {"libc10_cuda.so"}}, "needs ['libc10_cuda.so']"),
        (
            {"needed": frozenset({"libtorch_cpu.so", "libc.so.6"})},
            "does not need torch's library and a shared C++ runtime",
        ),
    ],
)
def test_what_may_not_be_published_is_told(wheel, change, fault):
    assert wheel_facts.faults(wheel_facts.read(wheel)._replace(**change)) == [fault]


def test_the_best_kernels_are_chosen_and_an_exception_of_one_arrives(wheel, tmp_path):
    python = environment(tmp_path / "venv", "torch")
    install(python, wheel, cwd=tmp_path)
    assert run(python, "-c", CHOSEN, cwd=tmp_path).stdout.split() == [SETS[-1], str(HAS_OWN_GEMM)]
    told = run(python, "-c", THROWN, cwd=tmp_path).stdout
    assert told.startswith(
        "caught nitp_ops row kernel: up must be a CPU tensor of 2 rows with 8 dense columns"
    )
    assert compiled(python, tmp_path)
    assert "native     ok" in run(python, "-m", "nitp_ops", "doctor", cwd=tmp_path).stdout


def test_a_setting_that_is_none_is_refused_before_anything_is_built(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "csrc/tools")
    backend = runpy.run_path(str(ROOT / "csrc/tools/backend.py"))
    for asked in ("yes", "riscv64"):
        with pytest.raises(
            SystemExit, match=f"portable={asked}, expected one of false, true, x86_64, aarch64"
        ):
            backend["get_requires_for_build_wheel"]({"portable": asked})
    assert (
        backend["portable"](None) is None
        and backend["portable"]({"portable": "aarch64"}) == "aarch64"
    )
