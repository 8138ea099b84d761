"""Parameters that an engine has cut: giving a DTensor its part of whole values."""

from __future__ import annotations

import torch
from torch import Tensor

from nitp_ops.core.checks import is_dtensor


@torch.no_grad()
def fill(parameter: Tensor, values: Tensor) -> None:
    """parameter <- values, whole and the same on every rank; a DTensor keeps its part of them.
    Nothing is sent.

    Values that are a DTensor already have the parameter's placements.
    """
    if not is_dtensor(parameter) or is_dtensor(values):
        parameter.copy_(values)
        return
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    values = values.to(parameter.device, parameter.dtype)
    parameter.copy_(distribute_tensor(values, mesh, placements, src_data_rank=None))
