"""Which nvcc builds the kernels: one that runs, compiles and links; of any other the reason is told."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from package_cases import program

LISTS = 'case "$*" in *--list-gpu-arch*) echo compute_80;; '
#: Writes what `-o` names, as a compiler does.
WRITES = '*" -c "*) for last; do :; done; echo code > "$last";; '


@pytest.fixture
def cuda() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[1] / "csrc/build_cuda.py"))


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (LISTS + "esac", "does not compile a kernel (no message)"),
        (
            LISTS + "*) echo 'fatal error: no host compiler' >&2; exit 1;; esac",
            "does not compile a kernel (fatal error: no",
        ),
        (LISTS + WRITES + "esac", "has no libcudart_static.a beside it"),
        ("echo compute_50", "knows none of sm_80"),
    ],
)
def test_what_an_nvcc_cannot_do_is_the_reason(cuda, tmp_path, script, reason):
    assert cuda["unusable"](str(program(tmp_path, "nvcc", script))).startswith(reason)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"\x7fELF\x02\x01\x01" + bytes(80), "Exec format error"), (b"#!/absent/sh\n", "No such file or directory")],
)
def test_an_nvcc_that_does_not_run_is_the_reason(cuda, tmp_path, content, reason):
    nvcc = tmp_path / "nvcc"
    nvcc.write_bytes(content)
    nvcc.chmod(0o755)
    assert cuda["unusable"](str(nvcc)) == f"does not run ({reason})"


def test_architectures_that_are_asked_for_without_an_nvcc_are_an_error(cuda, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cuda["find_nvcc"].__wrapped__() is None
    monkeypatch.setenv("NITP_CUDA_ARCHITECTURES", "sm_90")
    with pytest.raises(SystemExit, match="NITP_CUDA_ARCHITECTURES names sm_90, but no nvcc is on the PATH"):
        cuda["find_nvcc"].__wrapped__()
