"""Which nvcc builds the kernels: one that runs, compiles and links; of any other the reason is
told."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.packaging.package_cases import program

LISTS = 'case "$*" in *--list-gpu-arch*) echo compute_80;; '
#: Writes what `-o` names, as a compiler does.
WRITES = '*" -c "*) for last; do :; done; echo code > "$last";; '


@pytest.fixture
def cuda() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[2] / "csrc/tools/build_cuda.py"))


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
    [
        (b"\x7fELF\x02\x01\x01" + bytes(80), "Exec format error"),
        (b"#!/absent/sh\n", "No such file or directory"),
    ],
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
    with pytest.raises(
        SystemExit, match="NITP_CUDA_ARCHITECTURES names sm_90, but no nvcc is on the PATH"
    ):
        cuda["find_nvcc"].__wrapped__()


def codes(flags: str) -> dict[str, str]:
    """Machine codes by the architecture whose PTX they are made from."""
    return dict(re.findall(r"-gencode arch=(\w+),code=\[([\w,]+)\]", flags))


@pytest.mark.parametrize(
    ("kernel", "asked", "expected"),
    [
        ("swiglu", "", {"compute_80": "sm_80", "compute_90": "sm_90,sm_100,sm_120,compute_90"}),
        ("swiglu", "sm_100 sm_80", {"compute_80": "sm_80", "compute_100": "sm_100"}),
        (
            "cross_entropy",
            "",
            {
                "compute_80": "sm_80",
                "compute_90": "sm_90,compute_90",
                "compute_100": "sm_100,sm_120",
            },
        ),
        ("cross_entropy", "sm_120", {"compute_120": "sm_120"}),
        ("cross_entropy", "sm_90", {"compute_90": "sm_90,compute_90"}),
    ],
)
def test_kernels_over_logits_alone_are_compiled_for_each_generation(
    cuda, monkeypatch, tmp_path, kernel, asked, expected
):
    nvcc = program(
        tmp_path, "nvcc", "echo compute_75 compute_80 compute_90 compute_100 compute_120"
    )
    monkeypatch.setenv("NITP_CUDA_ARCHITECTURES", asked)
    assert codes(cuda["flags"](str(nvcc), kernel)) == expected


def test_an_nvcc_that_knows_no_messages_between_blocks_is_told_apart(cuda, tmp_path):
    """CUDA 12.0 knows sm_90 and not st.async."""
    known = 'case "$*" in *--list-gpu-arch*) echo compute_90;; *) for f; do grep -q st.async "$f" 2>/dev/null && '
    nvcc = program(tmp_path, "nvcc", known + "{ echo 'error: st.async' >&2; exit 1; }; done;; esac")
    assert cuda["unusable"](str(nvcc)) == "does not compile a kernel (error: st.async)"
