"""Distances of paired rows and their gradients (csrc/formulas/alignment.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference import power_of_two, working
from ..table import Sample, row_kernel
from .blocks import blocks, normal, wide

_COSINE, _MSE, _SMOOTH_L1, _KL = range(4)


def _sample(n: int, columns: int, dtype: torch.dtype) -> Sample:
    prediction, target, gradient = (normal(n, columns, dtype) for _ in range(3))
    work = working(prediction)
    stats, scale = torch.empty(4, n, dtype=work), torch.rand(n, dtype=work)
    arguments = prediction, target, None, scale, stats, gradient, None, _COSINE, 1e-6, True
    return Sample(arguments, 3 * prediction.nbytes)


@row_kernel(writes=("prediction", "stats", "d_prediction", "d_target"), sample=_sample)
def alignment_rows_(
    prediction: Tensor,
    target: Tensor,
    target_rows: Tensor | None,
    row_scale: Tensor | None,
    stats: Tensor,
    d_prediction: Tensor | None,
    d_target: Tensor | None,
    distance: int,
    eps: float,
    gradient: bool,
) -> None:
    """stats [4, N]: loss, cosine, |prediction|, |target|; with `gradient` row_scale times the
    gradients."""
    work = working(prediction, target)
    d_prediction = prediction if d_prediction is None else d_prediction
    for part in blocks(prediction):
        p = wide(prediction[part], work)
        z = wide(target[part] if target_rows is None else target[target_rows[part]], work)
        scale = p.new_ones(len(p)) if row_scale is None else row_scale[part].to(work)
        pair = _Cosine(p, z, eps)
        loss, of_prediction, of_target = (
            (pair.loss(), *pair.gradients()) if distance == _COSINE else _apart(p, z, distance)
        )
        stats[:, part] = torch.stack([loss, pair.cosine, pair.p_norm, pair.z_norm])
        if not gradient:
            continue
        inactive = (scale == 0).unsqueeze(1)
        d_prediction[part] = (
            (scale.unsqueeze(1) * of_prediction).masked_fill(inactive, 0).to(d_prediction.dtype)
        )
        if d_target is not None:
            d_target[part] = (
                (scale.unsqueeze(1) * of_target).masked_fill(inactive, 0).to(d_target.dtype)
            )


class _Cosine:
    """c = p.z / (|p| |z|), norms clamped at eps; rows are scaled by a power of two, so that no
    square overflows."""

    def __init__(self, p: Tensor, z: Tensor, eps: float) -> None:
        self.p_norm, self.p_size, self.p_unit = self._unit(p, eps)
        self.z_norm, self.z_size, self.z_unit = self._unit(z, eps)
        self.p_active, self.z_active = self.p_norm >= eps, self.z_norm >= eps
        self.cosine = (self.p_unit * self.z_unit).sum(1)

    @staticmethod
    def _unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        largest = x.abs().amax(1, keepdim=True) if x.shape[1] else x.new_zeros(len(x), 1)
        size = power_of_two(largest)
        small = x / size
        length = small.square().sum(1, keepdim=True).sqrt()
        norm = length * size
        # a NaN norm stays NaN instead of turning into eps
        below = norm < eps
        unit = torch.where(below, x / eps, small / torch.where(below, 1, length))
        return norm.squeeze(1), torch.where(below, eps, norm).squeeze(1), unit

    def loss(self) -> Tensor:
        """Half the squared chord where c > 1/2: 1 - c loses digits there."""
        near = (self.cosine > 0.5) & self.p_active & self.z_active
        chord = (self.p_unit - self.z_unit).square().sum(1) / 2
        return torch.where(near, chord, 1 - self.cosine)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """-(z^ - c p^) / |p| and the same for z, zero where a norm is below eps."""
        c = self.cosine.unsqueeze(1)
        of_p = (c * self.p_unit - self.z_unit) / self.p_size.unsqueeze(1)
        of_z = (c * self.z_unit - self.p_unit) / self.z_size.unsqueeze(1)
        below_p, below_z = (
            (self.p_norm < self.p_size).unsqueeze(1),
            (self.z_norm < self.z_size).unsqueeze(1),
        )
        return of_p.masked_fill(below_p, 0), of_z.masked_fill(below_z, 0)


def _apart(p: Tensor, z: Tensor, distance: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients of mse, smooth_l1 and kl."""
    if distance == _KL:
        log_p, log_z = p.log_softmax(1), z.log_softmax(1)
        q = log_z.exp()
        log_ratio = log_z - log_p
        # 0 log 0 = 0
        loss = torch.where(q == 0, 0, q * log_ratio).sum(1)
        return loss, log_p.exp() - q, torch.where(q == 0, 0, q * (log_ratio - loss.unsqueeze(1)))
    columns = p.shape[1]
    difference = p - z
    if distance == _MSE:
        slope = 2 * difference / columns
        return difference.square().mean(1), slope, -slope
    size = difference.abs()
    slope = difference.clamp(-1, 1) / columns
    return torch.where(size < 1, difference.square() / 2, size - 0.5).mean(1), slope, -slope
