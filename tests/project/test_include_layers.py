"""The layers of csrc/ as data, and that every file which is named by its path is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
#: A file or a folder of csrc/ -> the files and folders that it includes at most. The longest key
#: counts.
LAYERS: dict[str, tuple[str, ...]] = {
    "host_device.h": (),
    "torch_abi.h": (),
    "build_info.cpp": (),
    "python_module.cpp": (),
    "kernel_params.h": ("formulas/alignment.h",),
    "schemas.cpp": ("kernel_params.h", "torch_abi.h"),
    "argument_checks.h": ("kernel_params.h", "torch_abi.h"),
    "dispatch_cross_entropy.h": ("argument_checks.h",),
    "dispatch.h": ("argument_checks.h", "dispatch_cross_entropy.h"),
    "formulas": ("formulas", "host_device.h", "kernel_params.h"),
    "cpu": ("cpu", "formulas", "host_device.h", "kernel_params.h"),
    "cpu/register.cpp": ("cpu", "dispatch.h"),
    "cpu/prefault.cpp": ("torch_abi.h",),
    "cpu/gemm/register.cpp": ("cpu", "torch_abi.h"),
    "cuda": ("cuda", "formulas", "host_device.h", "kernel_params.h"),
    "cuda/register.cpp": ("cuda", "dispatch.h"),
    "cuda/stream.h": ("torch_abi.h",),
}
#: Headers with a suffix that csrc/ takes from elsewhere; simt.h stands in for CUDA's in tests.
OUTSIDE = {
    "build_info.inc",
    "cpuid.h",
    "dlfcn.h",
    "immintrin.h",
    "pybind11/pybind11.h",
    "simt.h",
    "stream.h",
}
OUTSIDE |= {"pthread.h", "sys/mman.h", "unistd.h"}
SOURCES = [path for path in sorted(CSRC.rglob("*")) if path.suffix in (".h", ".cpp", ".cu")]
PYTHON = [path for path in ROOT.glob("[!.]*/**/*.py") if path.relative_to(ROOT).parts[0] != "build"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_a_source_includes_what_lies_below_it(source):
    here, text = str(source.relative_to(CSRC)), source.read_text()
    allowed = LAYERS[max((key for key in LAYERS if f"{here}/".startswith(f"{key}/")), key=len)]
    for name in re.findall(r'#include "(.+)"', text):
        assert (source.parent / name).is_file(), f"{here} includes {name}, which does not exist"
        included = str((source.parent / name).resolve().relative_to(CSRC))
        assert any(f"{included}/".startswith(f"{key}/") for key in allowed), (
            f"{here} includes {included}"
        )
    assert {
        name for name in re.findall(r"#include <(.+)>", text) if re.search(r"[./]", name)
    } <= OUTSIDE, here


def test_every_file_that_is_named_by_its_path_exists():
    for path in [ROOT / "Makefile", ROOT / "setup.py", *PYTHON]:
        text = path.read_text()
        for name in re.findall(
            r"\bcsrc/[\w/]+\.(?:cpp|cu|h|py)\b", text.replace("torch/csrc/", "")
        ):
            assert (ROOT / name).is_file(), f"{path.relative_to(ROOT)} names {name}"
        for name in re.findall(r"(?:run_path|get_template)\([^\"\n]*\"([\w/.]+)\"", text):
            found = [ROOT / name, *path.parent.glob(name), *ROOT.glob(f"*/{name}")]
            assert any(each.is_file() for each in found), f"{path.relative_to(ROOT)} names {name}"
