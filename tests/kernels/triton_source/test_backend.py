"""Who serves CUDA tensors: compiled kernels, else Triton's through the dispatcher, else a refusal
with every reason."""

import os
import subprocess
import sys
from importlib import util

import pytest
import torch

import nitp_ops
from nitp_ops import __main__ as command
from nitp_ops.core import library
from nitp_ops.kernels import select

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
NEEDS_TRITON = pytest.mark.skipif(
    util.find_spec("triton") is None, reason="triton is not installed"
)


def python(code: str, **environment: str) -> str:
    """What `code` prints in a fresh process."""
    full = os.environ | environment
    done = subprocess.run(
        [sys.executable, "-c", code], env=full, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def a_gpu(monkeypatch):
    """As on a machine with a GPU whose kernels no CUDA compiler built."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(select, "_COMPILED_FOR", {"cpu", "meta"})
    monkeypatch.setattr(library, "cuda_refusal", lambda index: None)
    select._load_triton.cache_clear()
    yield
    select._load_triton.cache_clear()


BY_DISPATCHER = """
import torch, warnings
warnings.simplefilter("ignore")
def no_library(path): raise OSError("no library for this test")
{hide}
import nitp_ops, nitp_ops.kernels.select, nitp_ops.kernels.triton
assert (nitp_ops.kernels.select.load_error is None) == {library}
gate = torch.randn(3, 7); up, out = torch.randn(3, 7), torch.zeros(3, 7)
operator = torch.ops.nitp_ops.swiglu_rows.default
operator.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), gate, up, out)
torch.testing.assert_close(out, nitp_ops.reference.swiglu(gate, up))
print(operator._schema)
"""


NO_CUDA_BUILT = pytest.mark.skipif(
    "cuda" in select._COMPILED_FOR, reason="the library serves CUDA tensors itself"
)


@NEEDS_TRITON
@pytest.mark.parametrize(
    "with_library",
    [
        pytest.param(True, marks=NO_CUDA_BUILT, id="beside the library"),
        pytest.param(False, id="without the library"),
    ],
)
def test_the_dispatcher_reaches_triton_for_cuda_tensors(with_library):
    hide = "" if with_library else "torch.ops.load_library = no_library"
    printed = python(BY_DISPATCHER.format(hide=hide, library=with_library), TRITON_INTERPRET="1")
    assert printed.strip() == "nitp_ops::swiglu_rows(Tensor gate, Tensor up, Tensor(a!) out) -> ()"


COMPILED_BEFORE = """
import torch, nitp_ops
def seven(gate, up, out): out.fill_(7)
compiled = torch.library.Library("nitp_ops", "IMPL", "CUDA")
compiled.impl("swiglu_rows", seven)
import nitp_ops.kernels.triton
x, keys = torch.zeros(2, 3), torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
torch.ops.nitp_ops.swiglu_rows.default.redispatch(keys, x, x, x)
assert (x == 7).all()
assert torch._C._dispatch_has_kernel_for_dispatch_key("nitp_ops::accumulate_rows_", "CUDA")
"""


@NEEDS_TRITON
def test_compiled_cuda_kernels_keep_their_place():
    python(COMPILED_BEFORE)


def test_importing_nitp_ops_imports_no_triton_and_needs_none():
    python(
        "import nitp_ops, sys; assert 'triton' not in sys.modules and 'torch._dynamo' not in "
        "sys.modules"
    )
    reason = python(
        "import sys; sys.modules['triton'] = None; import nitp_ops.kernels.select, "
        "torch;print(nitp_ops.kernels.select.triton_unavailable_reason())"
    )
    assert reason.strip() == "triton is not installed"


@NEEDS_TRITON
def test_the_device_decides_and_compiled_kernels_come_first(a_gpu, monkeypatch):
    assert select.select_backend("swiglu", CPU, None) == "native"
    assert (
        select.select_backend("swiglu", CUDA, None)
        == select.select_backend("swiglu", CUDA, "triton")
        == "triton"
    )
    monkeypatch.setattr(select, "_COMPILED_FOR", {"cpu", "meta", "cuda"})
    assert (
        select.select_backend("swiglu", CUDA, None)
        == select.select_backend("swiglu", CUDA, "native")
        == "native"
    )
    assert select.select_backend("swiglu", CUDA, "triton") == "triton"
    monkeypatch.setattr(select, "load_error", "there is no library")
    assert select.select_backend("swiglu", CUDA, None) == "triton"


@NEEDS_TRITON
def test_a_refusal_lists_every_reason(a_gpu, monkeypatch):
    x = torch.ones(2)
    with pytest.raises(
        nitp_ops.BackendError,
        match=r"backend='triton' does not serve cpu "
        r"tensors. native: serves",
    ):
        nitp_ops.swiglu(x, x, backend="triton")
    with pytest.raises(
        nitp_ops.BackendError,
        match=r"'native' .* cuda tensors. native: no "
        r"compiled .* triton: serves",
    ):
        select.select_backend("swiglu", CUDA, "native")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    select._load_triton.cache_clear()
    everything = (
        r"backend='triton' does not serve cuda tensors. native: no compiled .* triton: torch sees "
        r"no GPU. torch: "
    )
    with pytest.raises(nitp_ops.BackendError, match=everything):
        select.select_backend("swiglu", CUDA, "triton")


def test_the_choice_is_a_constant_of_a_compiled_graph(monkeypatch):
    # None when run, an error when traced
    monkeypatch.setattr(select, "_load_triton", torch._dynamo.graph_break)
    monkeypatch.setattr(select, "_COMPILED_FOR", {"cpu", "meta"})

    @torch.compile(fullgraph=True, backend="eager")
    def chosen(x):
        return x + 1 if select.select_backend("swiglu", CUDA, None) == "triton" else x

    assert chosen(torch.zeros(1)).item() == 1


def test_doctor_says_why_triton_is_off(monkeypatch, capsys):
    monkeypatch.setattr(select, "_load_triton", lambda: "torch sees no GPU")
    monkeypatch.setattr(select, "installed", lambda backend: backend != "triton")
    assert command.doctor() == 0
    assert "triton     off: torch sees no GPU" in capsys.readouterr().out


@NEEDS_TRITON
def test_doctor_calls_a_triton_that_does_not_load_broken(a_gpu, monkeypatch, capsys):
    found = select.importlib.import_module

    def broken(name, package):
        if name == ".triton":
            raise RuntimeError(f"{package}{name} is broken")
        return found(name, package)

    monkeypatch.setattr(select.importlib, "import_module", broken)
    assert command.doctor() == 1
    assert (
        "triton     BROKEN: the Triton kernels do not load: RuntimeError('nitp_ops.kernels.triton"
        in capsys.readouterr().out
    )
