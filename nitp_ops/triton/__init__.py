"""The row kernels in Triton: every schema of csrc/library.cpp for CUDA tensors where no CUDA compiler built them.

Importing this package, which needs triton, registers them with PyTorch's dispatcher for whatever row kernel has no
compiled CUDA version, and defines the schemas first where the compiled library is absent. The functions themselves
can be called too, whoever serves the dispatcher. `nitp_ops` imports it on the first CUDA tensor (rows.py).
"""

from __future__ import annotations

import torch

from .accumulate import accumulate_rows_
from .alignment import alignment_rows_
from .cross_entropy import cross_entropy_rows_
from .cross_entropy_gradient import cross_entropy_gradient_rows_
from .scale import scale_rows_
from .schemas import SCHEMAS
from .swiglu import swiglu_rows, swiglu_rows_backward_

KERNELS = (
    swiglu_rows,
    swiglu_rows_backward_,
    alignment_rows_,
    cross_entropy_rows_,
    cross_entropy_gradient_rows_,
    accumulate_rows_,
    scale_rows_,
)

__all__ = [
    "KERNELS",
    "SCHEMAS",
    "accumulate_rows_",
    "alignment_rows_",
    "cross_entropy_gradient_rows_",
    "cross_entropy_rows_",
    "scale_rows_",
    "swiglu_rows",
    "swiglu_rows_backward_",
]


def _register() -> tuple[torch.library.Library, torch.library.Library]:
    schemas, kernels = torch.library.Library("nitp_ops", "FRAGMENT"), torch.library.Library("nitp_ops", "IMPL", "CUDA")
    for kernel in KERNELS:
        name = kernel.__name__
        if not hasattr(torch.ops.nitp_ops, name):
            schemas.define(name + SCHEMAS[name])
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"nitp_ops::{name}", "CUDA"):
            kernels.impl(name, kernel)
    return schemas, kernels


_LIBRARIES = _register()  # kept: a registration lasts as long as its library
