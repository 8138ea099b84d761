"""csrc/torch_abi.h declares what torch declares, and what goes wrong in a kernel or a second copy
is an error."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nitp_ops.core import library

ROOT = Path(__file__).parents[2]
HEADER = ROOT / "csrc/torch_abi.h"
BESIDE = """
#define TORCH_TARGET_VERSION 0x020b000000000000
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include "torch_abi.h"
"""


def compiled_beside_torch(header: str, folder: Path) -> subprocess.CompletedProcess:
    """The declarations of `header` and torch's own in one translation unit."""
    (folder / "torch_abi.h").write_text(header)
    (folder / "both.cpp").write_text(BESIDE)
    torch_headers = Path(torch.__file__).parent / "include"
    command = [
        "g++",
        "-std=c++20",
        "-fsyntax-only",
        "-isystem",
        str(torch_headers),
        str(folder / "both.cpp"),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_declarations_are_those_of_torch(tmp_path):
    done = compiled_beside_torch(HEADER.read_text(), tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("ours", "wrong"),
    [
        (
            "aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t*",
            "aoti_torch_get_dtype(AtenTensorHandle tensor, int64_t*",
        ),
        ("int32_t aoti_torch_dtype_int64()", "int64_t aoti_torch_dtype_int64()"),
        ("using StableIValue = uint64_t", "using StableIValue = int64_t"),
    ],
)
def test_a_declaration_that_differs_does_not_compile(ours, wrong, tmp_path):
    header = HEADER.read_text()
    assert ours in header
    done = compiled_beside_torch(header.replace(ours, wrong), tmp_path)
    assert done.returncode != 0 and "conflicting declaration" in done.stderr


def test_the_library_needs_nothing_of_torch_but_what_the_header_declares():
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library.LIBRARY)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    wanted = {line.split()[-1] for line in listed.splitlines() if "torch" in line or "c10" in line}
    declared = HEADER.read_text()
    assert wanted and not [
        name for name in wanted if f" {name}(" not in declared and f"\n{name}(" not in declared
    ]


def test_an_error_in_a_kernel_arrives_in_python_with_its_message():
    rows = torch.randn(2, 8)
    message = r"nitp_ops row kernel: up must be a CPU tensor of 2 rows with 8 dense columns"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.nitp_ops.swiglu_rows(rows, rows[:, :4], rows)


def test_a_second_copy_of_the_library_is_refused_and_the_first_goes_on(tmp_path):
    copy = shutil.copy(library.LIBRARY, tmp_path / "libnitp_ops_again.so")
    code = f"""
import ctypes, torch, nitp_ops
again = ctypes.CDLL({str(copy)!r})
again.nitp_ops_registration_error.restype = ctypes.c_char_p
print("refused:", again.nitp_ops_registration_error().decode())
print("first:", nitp_ops.swiglu(torch.ones(1, 4), torch.ones(1, 4)).sum().item() > 2)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "refused: definition of nitp_ops failed" in done.stdout and "first: True" in done.stdout


def test_the_pybind11_module_says_what_the_library_says():
    from nitp_ops import _C

    assert _C.instruction_set() == library.instruction_set() and _C.has_gemm() == library.has_gemm()
    assert _C.build_info() == library.build_info()
    with pytest.raises(ValueError, match="name is 'avx1024'"):
        _C.choose_instruction_set("avx1024")
