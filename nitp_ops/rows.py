"""Who serves the row kernels: the tensor's device decides, through PyTorch's dispatcher.

`csrc/library.cpp` holds the schemas; the library registers their CPU kernels. An op asks `choose` once at its door
and then calls `torch.ops.nitp_ops.<kernel>`; a refusal lists the reason of every backend.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from . import _check

BACKENDS = ("native", "reference")
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


def refusal(device: torch.device) -> str | None:
    """Why the compiled kernels cannot serve tensors on `device`, or None."""
    if missing is not None:
        return missing
    if device.type not in ("cpu", "meta"):
        return f"no compiled row kernels for {device.type} tensors"
    return None


def choose(op: str, device: torch.device, backend: str | None) -> str:
    """The backend that runs this call: "native" or, only on request, "reference"."""
    if backend is not None:
        _check.one_of(op, "backend", backend, BACKENDS)
    if backend == "reference":
        return backend
    reason = refusal(device)
    if reason is not None:
        raise _check.BackendError(
            f"{op}: no backend for {device.type} tensors. native: {reason}. "
            "reference: only on request, backend='reference'."
        )
    return "native"
