"""Cross-entropy rows and their gradient (csrc/formulas/cross_entropy.h)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...reference import working
from ..table import Sample, row_kernel
from .blocks import blocks, normal, wide


def _transformed(
    logits: Tensor, bias: Tensor | None, softcap: float, logit_scale: float, work: torch.dtype
) -> Tensor:
    """z = cap tanh(scale (x + bias) / cap), or scale (x + bias)."""
    x = wide(logits, work)
    x = logit_scale * (x if bias is None else x + bias)
    return softcap * torch.tanh(x / softcap) if softcap > 0 else x


def _subtract_at(g: Tensor, labels: Tensor, weights: Tensor) -> None:
    """g[i, labels[i, k]] -= weights[i, k], k by k: duplicates add, in one order."""
    for label, weight in zip(labels.unbind(1), weights.unbind(1), strict=True):
        at = label.unsqueeze(1)
        g.scatter_(1, at, g.gather(1, at) - weight.unsqueeze(1))


def _store(
    logits: Tensor, g: Tensor, z: Tensor, softcap: float, logit_scale: float, active: Tensor
) -> None:
    """The chain rule through scale and softcap, and the one rounding."""
    g = logit_scale * (g * (1 - (z / softcap).square()) if softcap > 0 else g)
    logits.copy_(g.masked_fill(~active.unsqueeze(1), 0))


def _whole_rows(n: int, columns: int, dtype: torch.dtype) -> Sample:
    kept = normal(n, columns, dtype)
    logits, labels, work = kept.clone(), torch.randint(columns, (n, 1)), working(kept)
    stats, picked = torch.empty(2, n, dtype=work), torch.empty(n, 1, dtype=work)
    best, scale = torch.empty(n, dtype=torch.int64), torch.rand(n, dtype=work)
    options = -100, False, 0.0, 0.0, 0.0, 1.0, True
    arguments = logits, labels, None, None, None, scale, stats, picked, best, *options
    return Sample(arguments, 2 * logits.nbytes, partial(logits.copy_, kept))


@row_kernel(
    writes=("logits", "stats", "target_logit", "prediction", "softmax_partials"), sample=_whole_rows
)
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
    softmax_partials: Tensor | None = None,
) -> None:
    """Loss, log-sum-exp (and entropy, where stats has three rows) of each row; with `gradient` over
    the logits.

    logits [N, V]; labels, target_weight, target_logit [N, K]; bias, class_weight [V]; row_scale,
    prediction [N]; softmax_partials [4, N]. Without these the prediction of a row without a target
    is -1."""
    columns, work, e = logits.shape[1], stats.dtype, label_smoothing
    unknown = float("nan")
    for part in blocks(logits):
        z = _transformed(logits[part], bias, softcap, logit_scale, work)
        most, best = z.amax(1, keepdim=True), z.argmax(1)
        shifted = z - most
        exponential = shifted.exp()
        exp_sum = exponential.sum(1)
        log_sum = exp_sum.log()
        lse = most.squeeze(1) + log_sum

        given = labels[part]
        absent = given == ignore_index
        if negative_is_absent:
            absent = absent | (given < 0)
        valid = (given >= 0) & (given < columns) & ~absent
        inside = given.masked_fill(~valid, 0)
        at_target = z.gather(1, inside).masked_fill(~valid, unknown)
        weight = (
            torch.ones_like(at_target)
            if target_weight is None
            else target_weight.view(labels.shape)[part]
        )
        # a label outside [0, V) weighs NaN, which spoils the loss and the gradient of its row
        weight = torch.where(absent, 0, weight.masked_fill(~valid & ~absent, unknown))
        gap = log_sum.unsqueeze(1) + (most - at_target)
        loss = (1 - e) * torch.where(weight == 0, 0, weight * gap).sum(1)
        weight_sum, active = weight.sum(1), (~absent).any(1)

        smooth_weight_sum, shifted_logit_sum = weight_sum, torch.zeros_like(exp_sum)
        if e > 0:
            if class_weight is None:
                shifted_logit_sum = shifted.sum(1)
                loss = loss + e * weight_sum * (log_sum - shifted_logit_sum / columns)
            else:
                weighed = torch.where(class_weight == 0, 0, class_weight * shifted)
                shifted_logit_sum = weighed.sum(1)
                smooth_weight_sum = class_weight.sum() / columns
                loss = loss + e * (smooth_weight_sum * log_sum - shifted_logit_sum / columns)
        if z_loss > 0:
            loss = loss + z_loss * lse.square()
        entropy_sum = torch.zeros_like(exp_sum)
        if len(stats) == 3:
            # a probability of zero adds nothing, however small its logit is
            entropy_sum = torch.where(exponential == 0, 0, exponential * -shifted).sum(1)
            stats[2, part] = torch.where(active, log_sum + entropy_sum / exp_sum, unknown)
        stats[0, part] = torch.where(active, loss, 0)
        stats[1, part] = torch.where(active, lse, unknown)
        prediction[part] = best if softmax_partials is not None else best.masked_fill(~active, -1)
        target_logit.view(labels.shape)[part] = at_target
        if softmax_partials is not None:
            softmax_partials[:, part] = torch.stack(
                [most.squeeze(1), exp_sum, shifted_logit_sum, entropy_sum]
            )
        if not gradient:
            continue
        scale = torch.ones_like(exp_sum) if row_scale is None else row_scale[part]
        softmax_weight = (1 - e) * weight_sum + e * smooth_weight_sum
        if z_loss > 0:
            softmax_weight = softmax_weight + 2 * z_loss * lse
        g = exponential * (scale * softmax_weight / exp_sum).unsqueeze(1)
        if e > 0:
            uniform_coeff = scale * (e / columns) * (weight_sum if class_weight is None else 1)
            g -= uniform_coeff.unsqueeze(1) * (1 if class_weight is None else class_weight)
        target_coeff = torch.where(valid, (1 - e) * scale.unsqueeze(1) * weight, 0)
        _subtract_at(g, inside, target_coeff)
        _store(logits[part], g, z, softcap, logit_scale, (scale != 0) & active)


def _known_rows(n: int, columns: int, dtype: torch.dtype) -> Sample:
    kept = normal(n, columns, dtype)
    logits, wide_logits = kept.clone(), kept.to(working(kept))
    labels = torch.randint(columns, (n, 1))
    picked = wide_logits.gather(1, labels)
    scale = torch.rand(n, 1, dtype=wide_logits.dtype)
    top = wide_logits.amax(1)
    softmax_coeff = 1 / (wide_logits - top[:, None]).exp().sum(1)
    grad_coeffs = torch.stack([top, softmax_coeff, torch.zeros_like(top)])
    arguments = logits, labels, scale, picked, None, None, grad_coeffs, 0.0, 1.0
    return Sample(arguments, 2 * logits.nbytes, partial(logits.copy_, kept))


@row_kernel(writes=("logits",), sample=_known_rows)
def cross_entropy_gradient_rows_(
    logits: Tensor,
    labels: Tensor,
    target_scale: Tensor,
    target_logit: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    grad_coeffs: Tensor,
    softcap: float,
    logit_scale: float,
) -> None:
    """The gradient over the logits of rows whose maximum and sum are known: grad_coeffs [3, N] max,
    softmax_coeff, uniform_coeff."""
    columns = logits.shape[1]
    for part in blocks(logits):
        z = _transformed(logits[part], bias, softcap, logit_scale, grad_coeffs.dtype)
        most, softmax_coeff, uniform_coeff = grad_coeffs[:, part].unsqueeze(2).unbind(0)
        weight = 1 if class_weight is None else class_weight
        g = softmax_coeff * (z - most).exp() - uniform_coeff * weight
        given, scale = labels[part], target_scale.view(labels.shape)[part]
        here = (given >= 0) & (given < columns) & (scale != 0)
        _subtract_at(g, given.masked_fill(~here, 0), torch.where(here, scale, 0))
        active = (softmax_coeff != 0) | (uniform_coeff != 0)
        _store(logits[part], g, z, softcap, logit_scale, active.squeeze(1))
