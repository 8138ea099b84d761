"""The table of row kernels: C++ and Python hold the same one, and every backend serves all of it
alike."""

import re
from importlib import util
from inspect import signature
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import sanitize
from nitp_ops.kernels import select, table
from tests.kernels.cuda_source.build_for_cpu import simt
from tests.support.interpreter import equal

TABLE = table.all_kernels()
ARGUMENTS = Path(__file__).parents[2] / "csrc/kernel_params.h"
KERNELS = pytest.mark.parametrize("kernel", TABLE)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
CPU = torch.device("cpu")
NEEDS_TRITON = pytest.mark.skipif(util.find_spec("triton") is None, reason="no triton")
NEEDS_LIBRARY = pytest.mark.skipif(select.load_error is not None, reason="no compiled library")


def test_both_tables_have_the_same_rows():
    assert sorted(re.findall(r"\bROW\((\w+),", ARGUMENTS.read_text())) == list(TABLE)


@NEEDS_LIBRARY
@KERNELS
def test_both_tables_have_the_same_schema(kernel):
    ours = torch._C.parse_schema(f"nitp_ops::{kernel}{TABLE[kernel].schema}")
    assert str(ours) == str(getattr(torch.ops.nitp_ops, kernel).default._schema)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"nitp_ops::{kernel}", "CPU")


@pytest.mark.parametrize("package", ["torch_rows", pytest.param("triton", marks=NEEDS_TRITON)])
def test_a_package_implements_every_row_with_the_arguments_of_its_schema(package):
    found = table.implementations(package)
    assert found.keys() == TABLE.keys()
    for kernel, function in found.items():
        schema = torch._C.parse_schema(f"nitp_ops::{kernel}{TABLE[kernel].schema}")
        names = [argument.name for argument in schema.arguments]
        assert list(signature(function).parameters) == names


@NEEDS_TRITON
def test_the_row_kernels_of_a_backend_are_found_by_name():
    for backend, package in (("torch", "torch_rows"), ("triton", "triton")):
        for name, function in table.implementations(package).items():
            assert getattr(select.row_kernels(backend), name) is function
        with pytest.raises(
            AttributeError, match=f"'nitp_ops.kernels.{package}' has no attribute 'cosine'"
        ):
            _ = select.row_kernels(backend).cosine
    for name in TABLE:
        assert getattr(select.row_kernels("native"), name) is getattr(torch.ops.nitp_ops, name)


@KERNELS
def test_a_sample_writes_what_its_schema_says_and_nothing_else(kernel):
    call = TABLE[kernel].sample(3, 33, torch.float32)
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in call.arguments]
    getattr(select.row_kernels("torch"), kernel)(*call.arguments)
    schema = torch._C.parse_schema(f"nitp_ops::{kernel}{TABLE[kernel].schema}")
    changed = {
        argument.name
        for argument, old, new in zip(schema.arguments, before, call.arguments, strict=False)
        if isinstance(old, torch.Tensor) and not torch.equal(old, new)
    }
    written = {
        a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write
    }
    assert changed and changed <= written


@NEEDS_LIBRARY
@KERNELS
def test_torch_gives_what_the_compiled_kernels_give(kernel, monkeypatch):
    monkeypatch.setattr(sanitize, "LONG", 1200)
    assert list(sanitize.differences(kernel, select.row_kernels("torch"), CPU)) == []


@pytest.mark.gpu_source
@NEEDS_TRITON
@NEEDS_LIBRARY
@DTYPES
@KERNELS
def test_triton_gives_what_the_compiled_kernels_give(kernel, dtype):
    for columns in (1, 33, 1000):
        equal(kernel, *TABLE[kernel].sample(3, columns, dtype).arguments)


@pytest.mark.gpu_source
@NEEDS_LIBRARY
@KERNELS
def test_the_cuda_source_gives_what_the_compiled_kernels_give(kernel, monkeypatch):
    simt()
    monkeypatch.setitem(sanitize.BRANCHES, kernel, lambda: iter(()))
    assert list(sanitize.differences(kernel, torch.ops.nitp_simt, CPU)) == []
