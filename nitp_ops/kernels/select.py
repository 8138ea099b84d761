"""Which backend serves the row kernels: the tensor's device decides, by PyTorch's dispatcher.

`table.py` holds the table of them; the library registers its kernels for CPU and, where a CUDA
compiler built them, for CUDA. Where it did not, `nitp_ops.kernels.triton` registers its own for
CUDA tensors, on the first of them. Every other device, and a CPU without the library, is served by
`torch_rows`: the same algorithm, row kernels of torch operations. A public function calls
`select_backend` once and gets the row kernels by name from `row_kernels`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from typing import Any

import torch

from ..core import checks, library
from ..core.library import LIBRARY, load_error, users_stacklevel

BACKENDS = ("native", "triton", "torch", "reference")


def _compiled_for_cuda() -> bool:
    return load_error is None and torch._C._dispatch_has_kernel_for_dispatch_key(
        "nitp_ops::cross_entropy_rows_", "CUDA"
    )


# Read before Triton registers its own.
_COMPILED_FOR = {"cpu", "meta", "cuda"} if _compiled_for_cuda() else {"cpu", "meta"}


@functools.cache
def _load_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    try:
        importlib.import_module(".triton", __package__)
    # whatever a broken installation raises: it is one backend's reason, not a crash
    except Exception as error:
        return f"the Triton kernels do not load: {error!r}"
    return None


def triton_unavailable_reason() -> str | None:
    """None when the Triton kernels are loaded (by the first call), else why they are not."""
    return _load_triton()


# What torch.compiler.assume_constant_result sets; the function itself would import torch._dynamo,
# and triton with it.
triton_unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def installed(backend: str) -> bool:
    """Whether all that the backend needs is there, so that a refusal means that it is broken."""
    if backend == "triton":
        return importlib.util.find_spec("triton") is not None and torch.cuda.is_available()
    return backend in ("torch", "reference") or LIBRARY.exists()


def unavailable_reason(device: torch.device, backend: str = "native") -> str | None:
    """Why the row kernels of `backend` ("native", "triton" or "torch") cannot serve tensors on
    `device`, or None."""
    if backend == "torch":
        return None
    if backend == "triton":
        if device.type != "cuda":
            return "its row kernels serve cuda tensors only"
        return triton_unavailable_reason()
    if load_error is not None:
        return load_error
    if device.type not in _COMPILED_FOR:
        return f"no compiled row kernels for {device.type} tensors"
    if device.type == "cuda" and torch.cuda.is_available():
        return library.cuda_refusal(device.index or 0)
    return None


def select_backend(op: str, device: torch.device, backend: str | None) -> str:
    """The backend that runs this call: "native" where compiled kernels serve the device, else
    "triton", else "torch", after one RuntimeWarning per device type; or `backend`.

    Raises:
        ValueError: an unknown backend.
        BackendError: the requested one does not serve the device; the message lists every reason.
    """
    if backend is None:
        for name in ("native", "triton"):
            if unavailable_reason(device, name) is None:
                return name
        if device.type != "cpu":  # of CPU tensors the import has warned
            _warn_that_torch_serves(device.type)
        return "torch"
    checks.one_of(op, "backend", backend, BACKENDS)
    if backend == "reference" or unavailable_reason(device, backend) is None:
        return backend
    reasons = " ".join(
        f"{name}: {unavailable_reason(device, name) or 'serves them'}."
        for name in ("native", "triton", "torch")
    )
    raise checks.BackendError(
        f"{op}: backend={backend!r} does not serve {device.type} tensors. {reasons} reference: "
        "only on request, backend='reference'."
    )


def _warn_that_torch_serves(kind: str) -> None:
    _warn_once(kind)


# As triton_unavailable_reason: nothing of it is traced.
_warn_that_torch_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _warn_once(kind: str) -> None:
    device = torch.device(kind)
    reasons = [f"{name}: {unavailable_reason(device, name)}" for name in ("native", "triton")]
    warnings.warn(
        f"nitp_ops: {kind} tensors are served by backend='torch', same memory bound but slower "
        f"({'; '.join(reasons)})",
        RuntimeWarning,
        stacklevel=users_stacklevel(),
    )


def row_kernels(backend: str) -> Any:
    """The row kernels by the names of the table, for a backend that `select_backend` returned.

    "native": the dispatcher's, which go by the tensor's device; "triton" and "torch": their own,
    also where compiled ones exist.
    """
    if backend == "native":
        return torch.ops.nitp_ops
    return importlib.import_module(".triton" if backend == "triton" else ".torch_rows", __package__)
