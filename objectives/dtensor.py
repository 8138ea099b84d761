"""Parameters that an engine has cut: recognising a DTensor, and giving it its part of whole values."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor.

    Where torch.distributed.tensor was never imported there is none; importing it took 2.3 s (2 busy cores).
    """
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


@torch.no_grad()
def fill(parameter: Tensor, values: Tensor) -> None:
    """parameter <- values, whole and the same on every rank; a DTensor keeps its part of them. Nothing is sent.

    Values that are a DTensor already have the parameter's placements.
    """
    if not is_dtensor(parameter) or is_dtensor(values):
        parameter.copy_(values)
        return
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    values = values.to(parameter.device, parameter.dtype)
    parameter.copy_(distribute_tensor(values, mesh, placements, src_data_rank=None))
