"""The row kernels in torch operations, for devices that have neither compiled nor Triton kernels.

The equations are those of csrc/cross_entropy.h, csrc/alignment.h and csrc/swiglu.h, the arguments those of
csrc/library.cpp, the laws the same: float32 arithmetic (float64 for float64), one rounding at the store, rows of weight
zero left out and not multiplied by it. Only a block of rows exists in float32 at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .reference import power_of_two, working

#: Numbers of one block: its few temporaries together stay small beside a chunk of logits.
_BLOCK = 2**20
_COSINE, _MSE, _SMOOTH_L1, _KL = range(4)


def _blocks(rows: Tensor) -> Iterator[slice]:
    step = max(1, _BLOCK // max(1, rows.shape[1]))
    return (slice(first, first + step) for first in range(0, len(rows), step))


def _wide(rows: Tensor, work: torch.dtype) -> Tensor:
    """Dense, so that strides do not change what vectorised operations round."""
    return rows.to(work).contiguous()


def swiglu_rows(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """out = g sigmoid(g) u."""
    work = working(gate)
    for part in _blocks(gate):
        g, u = _wide(gate[part], work), _wide(up[part], work)
        out[part] = (g * g.sigmoid() * u).to(out.dtype)


def swiglu_rows_backward_(
    gate: Tensor, up: Tensor, upstream: Tensor, d_gate: Tensor | None = None, d_up: Tensor | None = None
) -> None:
    """d_gate = upstream u s (1 + g (1 - s)), d_up = upstream g s, s = sigmoid(g); None: in place."""
    work = working(gate)
    d_gate, d_up = gate if d_gate is None else d_gate, up if d_up is None else d_up
    for part in _blocks(gate):
        g, u = _wide(gate[part], work), _wide(up[part], work)
        s = g.sigmoid()
        scaled = _wide(upstream[part], work) * s
        of_gate, of_up = scaled * u * (1 + g * (1 - s)), scaled * g  # both before a store: g and u may be views
        d_gate[part] = of_gate.to(d_gate.dtype)
        d_up[part] = of_up.to(d_up.dtype)


def accumulate_rows_(sum: Tensor, addend: Tensor, factor: Tensor | None = None) -> None:
    """sum += factor addend, one number; zero adds nothing, whatever it meets."""
    if factor is None:
        sum += addend
        return
    for part in _blocks(sum):
        sum[part].addcmul_(torch.where(factor == 0, 0, addend[part].to(sum.dtype)), factor)


def scale_rows_(rows: Tensor, factor: Tensor, out: Tensor | None = None) -> None:
    """out = rows * factor, one number; None: in place; zero leaves no NaN."""
    out = rows if out is None else out
    for part in _blocks(rows):
        scaled = rows[part].to(factor.dtype) * factor
        out[part] = torch.where(factor == 0, 0, scaled).to(out.dtype)


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
    """stats [4, N]: loss, cosine, |prediction|, |target|; with `gradient` row_scale times the gradients."""
    work = working(prediction, target)
    d_prediction = prediction if d_prediction is None else d_prediction
    for part in _blocks(prediction):
        p = _wide(prediction[part], work)
        z = _wide(target[part] if target_rows is None else target[target_rows[part]], work)
        scale = p.new_ones(len(p)) if row_scale is None else row_scale[part].to(work)
        pair = _Cosine(p, z, eps)
        loss, of_prediction, of_target = (
            (pair.loss(), *pair.gradients()) if distance == _COSINE else _apart(p, z, distance)
        )
        stats[:, part] = torch.stack([loss, pair.cosine, pair.p_norm, pair.z_norm])
        if not gradient:
            continue
        inactive = (scale == 0).unsqueeze(1)
        d_prediction[part] = (scale.unsqueeze(1) * of_prediction).masked_fill(inactive, 0).to(d_prediction.dtype)
        if d_target is not None:
            d_target[part] = (scale.unsqueeze(1) * of_target).masked_fill(inactive, 0).to(d_target.dtype)


class _Cosine:
    """c = p.z / (|p| |z|), norms clamped at eps; rows are scaled by a power of two, so that no square overflows."""

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
        below_p, below_z = (self.p_norm < self.p_size).unsqueeze(1), (self.z_norm < self.z_size).unsqueeze(1)
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


def _transformed(logits: Tensor, bias: Tensor | None, softcap: float, logit_scale: float, work: torch.dtype) -> Tensor:
    """z = cap tanh(scale (x + bias) / cap), or scale (x + bias)."""
    x = _wide(logits, work)
    x = logit_scale * (x if bias is None else x + bias)
    return softcap * torch.tanh(x / softcap) if softcap > 0 else x


def _subtract_at(g: Tensor, labels: Tensor, weights: Tensor) -> None:
    """g[i, labels[i, k]] -= weights[i, k], k by k: duplicates add, in one order."""
    for label, weight in zip(labels.unbind(1), weights.unbind(1), strict=True):
        at = label.unsqueeze(1)
        g.scatter_(1, at, g.gather(1, at) - weight.unsqueeze(1))


def _store(logits: Tensor, g: Tensor, z: Tensor, softcap: float, logit_scale: float, active: Tensor) -> None:
    """The chain rule through scale and softcap, and the one rounding."""
    g = logit_scale * (g * (1 - (z / softcap).square()) if softcap > 0 else g)
    logits.copy_(g.masked_fill(~active.unsqueeze(1), 0))


def cross_entropy_rows_(
    logits: Tensor,
    labels: Tensor,
    target_weight: Tensor | None,
    bias: Tensor | None,
    class_weight: Tensor | None,
    row_scale: Tensor | None,
    stats: Tensor,
    target_logit: Tensor,
    prediction: Tensor,
    ignore_index: int,
    negative_is_absent: bool,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    gradient: bool,
    parts: Tensor | None = None,
) -> None:
    """Loss, log-sum-exp (and entropy, where stats has three rows) of each row; with `gradient` over the logits.

    logits [N, V]; labels, target_weight, target_logit [N, K]; bias, class_weight [V]; row_scale, prediction [N];
    parts [4, N]."""
    columns, work, e = logits.shape[1], stats.dtype, label_smoothing
    unknown = float("nan")
    for part in _blocks(logits):
        z = _transformed(logits[part], bias, softcap, logit_scale, work)
        most, best = z.amax(1, keepdim=True), z.argmax(1)
        below = z - most
        exponential = below.exp()
        mass = exponential.sum(1)
        log_sum = mass.log()
        lse = most.squeeze(1) + log_sum

        given = labels[part]
        absent = given == ignore_index
        if negative_is_absent:
            absent = absent | (given < 0)
        valid = (given >= 0) & (given < columns) & ~absent
        inside = given.masked_fill(~valid, 0)
        at_target = z.gather(1, inside).masked_fill(~valid, unknown)
        weight = torch.ones_like(at_target) if target_weight is None else target_weight.view(labels.shape)[part]
        # a label outside [0, V) weighs NaN, which spoils the loss and the gradient of its row
        weight = torch.where(absent, 0, weight.masked_fill(~valid & ~absent, unknown))
        gap = log_sum.unsqueeze(1) + (most - at_target)
        loss = (1 - e) * torch.where(weight == 0, 0, weight * gap).sum(1)
        weight_sum, active = weight.sum(1), (~absent).any(1)

        smooth_sum, below_sum = weight_sum, torch.zeros_like(mass)
        if e > 0:
            if class_weight is None:
                below_sum = below.sum(1)
                loss = loss + e * weight_sum * (log_sum - below_sum / columns)
            else:
                below_sum = torch.where(class_weight == 0, 0, class_weight * below).sum(1)
                smooth_sum = class_weight.sum() / columns
                loss = loss + e * (smooth_sum * log_sum - below_sum / columns)
        if z_loss > 0:
            loss = loss + z_loss * lse.square()
        entropy_sum = torch.zeros_like(mass)
        if len(stats) == 3:
            # a probability of zero adds nothing, however far below its logit lies
            entropy_sum = torch.where(exponential == 0, 0, exponential * -below).sum(1)
            stats[2, part] = torch.where(active, log_sum + entropy_sum / mass, unknown)
        stats[0, part] = torch.where(active, loss, 0)
        stats[1, part] = torch.where(active, lse, unknown)
        prediction[part] = best
        target_logit.view(labels.shape)[part] = at_target
        if parts is not None:
            parts[:, part] = torch.stack([most.squeeze(1), mass, below_sum, entropy_sum])
        if not gradient:
            continue
        scale = torch.ones_like(mass) if row_scale is None else row_scale[part]
        probability = (1 - e) * weight_sum + e * smooth_sum + (2 * z_loss * lse if z_loss > 0 else 0)
        g = exponential * (scale * probability / mass).unsqueeze(1)
        if e > 0:
            uniform = scale * (e / columns) * (weight_sum if class_weight is None else 1)
            g -= uniform.unsqueeze(1) * (1 if class_weight is None else class_weight)
        _subtract_at(g, inside, torch.where(valid, (1 - e) * scale.unsqueeze(1) * weight, 0))
        _store(logits[part], g, z, softcap, logit_scale, (scale != 0) & active)


def cross_entropy_gradient_rows_(
    logits: Tensor,
    labels: Tensor,
    target_scale: Tensor,
    target_logit: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    factors: Tensor,
    softcap: float,
    logit_scale: float,
) -> None:
    """The gradient over the logits of rows whose maximum and sum are known: factors [3, N] max, probability, off."""
    columns = logits.shape[1]
    for part in _blocks(logits):
        z = _transformed(logits[part], bias, softcap, logit_scale, factors.dtype)
        most, probability, off = factors[:, part].unsqueeze(2).unbind(0)
        g = probability * (z - most).exp() - off * (1 if class_weight is None else class_weight)
        given, scale = labels[part], target_scale.view(labels.shape)[part]
        here = (given >= 0) & (given < columns) & (scale != 0)
        _subtract_at(g, given.masked_fill(~here, 0), torch.where(here, scale, 0))
        _store(logits[part], g, z, softcap, logit_scale, ((probability != 0) | (off != 0)).squeeze(1))
