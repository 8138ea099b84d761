"""The row kernels in Triton: every one of the table for CUDA tensors where no CUDA compiler built
them.

Importing this package, which needs triton, registers them with PyTorch's dispatcher for whatever
row kernel has no compiled CUDA version, and defines the schemas first where the compiled library is
absent. The functions themselves can be called too, whatever is registered. `nitp_ops`
imports it on the first CUDA tensor (select.py).
"""

from __future__ import annotations

import torch

from .. import table

__getattr__ = table.attributes("triton")


def _register() -> tuple[torch.library.Library, torch.library.Library]:
    schemas = torch.library.Library("nitp_ops", "FRAGMENT")
    kernels = torch.library.Library("nitp_ops", "IMPL", "CUDA")
    for name, kernel in table.implementations("triton").items():
        if not hasattr(torch.ops.nitp_ops, name):
            schemas.define(name + table.all_kernels()[name].schema)
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"nitp_ops::{name}", "CUDA"):
            kernels.impl(name, kernel)
    return schemas, kernels


_LIBRARIES = _register()  # kept: a registration lasts as long as its library
