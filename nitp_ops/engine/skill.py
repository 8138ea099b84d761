"""What a constant predictor scores under the cosine distance, and how far a loss is below it.

    constant_predictor_loss = 1 - |mean z^|
    skill = 1 - loss / constant_predictor_loss

A constant p gives mean (1 - p^.z^) = 1 - p^.mean(z^), smallest where p points along mean(z^). |mean
z^|^2 is about the mean pairwise cosine of the targets: 0.89 gives 0.057.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# 2**20 float32 numbers, 4 MiB: the largest copy made for the sum.
_BLOCK_ELEMENTS = 2**20
_MIN_CONSTANT_LOSS = 1e-4


def unit_target_sum(
    target: Tensor, target_norm: Tensor, valid: Tensor, shift: int, eps: float
) -> Tensor:
    """``sum over valid t of z[t+shift] / max(|z[t+shift]|, eps)``: [D], float32 (float64 for
    float64); detached.

    Args:
        target: z ``[B, T, D]``. target_norm: ``|z[t+shift]|`` at t, ``[B, T]``, detached. valid:
            bool ``[B, T]``.
    """
    batch, length, width = target.shape
    dtype = torch.float64 if target.dtype == torch.float64 else torch.float32
    absent = ~valid
    scale = target_norm.to(dtype).clamp(min=eps).reciprocal().masked_fill(absent, 0)
    step = max(1, _BLOCK_ELEMENTS // max(1, batch * width))
    sums = []
    for begin in range(0, length - shift, step):
        end = min(begin + step, length - shift)
        rows = target.detach()[:, begin + shift : end + shift].to(dtype)
        # a masked target may hold NaN, which a factor of zero would keep
        rows = rows.masked_fill(absent[:, begin:end].unsqueeze(-1), 0)
        sums.append(scale[:, begin:end].flatten() @ rows.flatten(0, 1))
    return sum(sums[1:], start=sums[0]) if sums else target.new_zeros(width, dtype=dtype)


def constant_predictor(unit_sum: Tensor, count: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """(constant_predictor_loss, skill) from the sum of unit targets, their number and the mean
    loss; skill is NaN where the first is < 1e-4."""
    constant = 1 - torch.linalg.vector_norm(unit_sum) / count.clamp(min=1)
    skill = torch.where(constant < _MIN_CONSTANT_LOSS, math.nan, 1 - loss / constant)
    return constant, torch.where(count > 0, skill, math.nan)
