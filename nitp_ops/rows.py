"""Who serves the row kernels: the tensor's device decides, through PyTorch's dispatcher.

`csrc/library.cpp` holds the schemas; the library registers its kernels for CPU and, where a CUDA compiler built them,
for CUDA. Where it did not, `nitp_ops.triton` registers its own for CUDA tensors, on the first of them. An op asks
`choose` once at its door and takes the row kernels by name from `kernels`; a refusal lists every backend's reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch

from . import _check

BACKENDS = ("native", "triton", "reference")
_ABSENT = "it was installed without its compiled library (install torch and g++, then reinstall nitp_ops)"
LIBRARY = Path(__file__).parent / "libnitp_ops.so"


def _load() -> str | None:
    """Loads the compiled kernels; the reason when there are none."""
    if not LIBRARY.exists():
        return _ABSENT
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"the compiled library does not load: {str(error).splitlines()[0]}"
    return None


if not LIBRARY.exists():
    warnings.warn(f"nitp_ops: no compiled row kernels: {_ABSENT}", RuntimeWarning, stacklevel=2)

#: None when the compiled kernels are loaded, else why they are not.
missing: str | None = _load()


def _compiled_for_cuda() -> bool:
    return missing is None and torch._C._dispatch_has_kernel_for_dispatch_key("nitp_ops::cross_entropy_rows_", "CUDA")


# Asked before Triton registers its own.
_COMPILED_FOR = {"cpu", "meta", "cuda"} if _compiled_for_cuda() else {"cpu", "meta"}


@functools.cache
def _load_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    try:
        importlib.import_module("nitp_ops.triton")
    except Exception as error:  # whatever a broken installation raises: it is one backend's reason, not a crash
        return f"the Triton kernels do not load: {error!r}"
    return None


def triton_missing() -> str | None:
    """None when the Triton kernels are loaded (by the first call), else why they are not."""
    return _load_triton()


# What torch.compiler.assume_constant_result sets; the function itself would import torch._dynamo, and triton with it.
triton_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def installed(backend: str) -> bool:
    """Whether all that the backend needs is there, so that a refusal means that it is broken."""
    if backend == "triton":
        return importlib.util.find_spec("triton") is not None and torch.cuda.is_available()
    return backend == "reference" or LIBRARY.exists()


def refusal(device: torch.device, backend: str = "native") -> str | None:
    """Why the row kernels of `backend` ("native" or "triton") cannot serve tensors on `device`, or None."""
    if backend == "triton":
        return triton_missing() if device.type == "cuda" else "its row kernels serve cuda tensors only"
    if missing is not None:
        return missing
    if device.type not in _COMPILED_FOR:
        return f"no compiled row kernels for {device.type} tensors"
    return None


def choose(op: str, device: torch.device, backend: str | None) -> str:
    """The backend that runs this call: "native" where compiled kernels serve the device, else "triton"; or `backend`.

    Raises:
        ValueError: an unknown backend.
        BackendError: none, or not the one asked for, serves the device; the message lists every reason.
    """
    if backend is not None:
        _check.one_of(op, "backend", backend, BACKENDS)
    if backend == "reference":
        return backend
    for name in ("native", "triton") if backend is None else (backend,):
        if refusal(device, name) is None:
            return name
    reasons = " ".join(f"{name}: {refusal(device, name) or 'serves them'}." for name in ("native", "triton"))
    refused = "no backend for" if backend is None else f"backend={backend!r} does not serve"
    raise _check.BackendError(
        f"{op}: {refused} {device.type} tensors. {reasons} reference: only on request, backend='reference'."
    )


def kernels(backend: str) -> Any:
    """The row kernels by the names of csrc/library.cpp, for a backend that `choose` returned.

    "native": the dispatcher's, which go by the tensor's device; "triton": Triton's own, also where compiled ones exist.
    """
    return importlib.import_module("nitp_ops.triton") if backend == "triton" else torch.ops.nitp_ops
