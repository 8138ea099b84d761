"""Which dtype sums over many rows run in, on devices with and without float64."""

from __future__ import annotations

import torch
from torch import Tensor

#: Device types that have float64. MPS and Intel's client GPUs have none, and raise.
WITH_FLOAT64 = frozenset({"cpu", "cuda", "meta"})


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no float64."""
    return torch.float64 if device.type in WITH_FLOAT64 else torch.float32


def for_sums(x: Tensor) -> Tensor:
    """x in `sum_dtype` of its device."""
    return x.to(sum_dtype(x.device))


def with_float64(x: Tensor) -> Tensor:
    """x where float64 is: on its own device, else on the CPU."""
    return x if x.device.type in WITH_FLOAT64 else x.cpu()
