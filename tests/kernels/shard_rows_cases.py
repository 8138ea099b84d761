"""Rows of logits whose columns are cut in two: their softmax partials, and the gradient of one half, by
formulas in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAN = float("nan")
PARTIALS = ("max", "sum", "shifted_logit_sum", "entropy_sum")


def work(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def transformed(
    logits: Tensor, bias: Tensor | None, softcap: float, scale: float
) -> tuple[Tensor, Tensor]:
    """z and dz/dx, float64."""
    z = scale * (logits.double() + (0 if bias is None else bias.double()))
    if softcap == 0:
        return z, torch.full_like(z, scale)
    z = softcap * torch.tanh(z / softcap)
    return z, scale * (1 - (z / softcap) ** 2)


def partials_arguments(
    logits: Tensor, *, bias, class_weight, smoothing, softcap, scale, entropy
) -> list[Any]:
    """Of cross_entropy_rows_ with softmax_partials, without a gradient and without any target."""
    rows, dtype = len(logits), work(logits.dtype)
    stats = torch.full((3 if entropy else 2, rows), NAN, dtype=dtype)
    softmax_partials = torch.full((4, rows), NAN, dtype=dtype)
    outputs = stats, torch.full((rows, 1), NAN, dtype=dtype), torch.full((rows,), -7)
    labels = torch.full((rows, 1), -1)
    options = -1, True, smoothing, 0.0, softcap, scale, False
    return [logits, labels, None, bias, class_weight, None, *outputs, *options, softmax_partials]


def partials_by_formula(
    logits: Tensor, *, bias, class_weight, smoothing, softcap, scale, entropy
) -> Tensor:
    z, _ = transformed(logits, bias, softcap, scale)
    top = z.amax(1, keepdim=True)
    shifted = z - top
    e = shifted.exp()
    shifted_logit_sum = entropy_sum = torch.zeros(len(z), dtype=torch.float64)
    if smoothing:
        weighed = shifted if class_weight is None else shifted * class_weight.double()
        shifted_logit_sum = weighed.sum(1)
    if entropy:
        entropy_sum = -(e * shifted.masked_fill(e == 0, 0)).sum(1)
    return torch.stack([top[:, 0], e.sum(1), shifted_logit_sum, entropy_sum])


def gradient_arguments(
    logits: Tensor, *, bias, class_weight, softcap, scale, targets: int
) -> list[Any]:
    """Of cross_entropy_gradient_rows_: three rows, the second of zero coefficients and full of NaN;
    labels also outside."""
    columns, dtype = logits.shape[1], work(logits.dtype)
    logits[1] = NAN
    labels = torch.randint(-1, columns + 1, (3, targets))
    labels[0, -1] = labels[0, 0]  # twice where there are several
    z, _ = transformed(logits, bias, softcap, scale)
    at = z.gather(1, labels.clamp(0, columns - 1)).to(dtype)
    target_scale = torch.rand(3, targets, dtype=dtype)
    target_scale[1], target_scale[2, 0] = 0, 0
    top = z.nan_to_num(0).amax(1) + torch.tensor([0.0, 0.0, 1.5])
    softmax_coeff = torch.tensor([0.4, 0.0, 1.1])
    uniform_coeff = torch.tensor([0.01, 0.0, 0.0])
    grad_coeffs = torch.stack([top, softmax_coeff, uniform_coeff]).to(dtype)
    return [logits, labels, target_scale, at, bias, class_weight, grad_coeffs, softcap, scale]


def gradient_by_formula(arguments: list[Any]) -> Tensor:
    logits, labels, target_scale, _, bias, class_weight, grad_coeffs, softcap, scale = arguments
    z, slope = transformed(logits, bias, softcap, scale)
    top, softmax_coeff, uniform_coeff = grad_coeffs.double().unsqueeze(2)
    weights = (
        torch.ones(z.shape[1], dtype=torch.float64)
        if class_weight is None
        else class_weight.double()
    )
    g = softmax_coeff * (z - top).exp() - uniform_coeff * weights
    inside = (labels >= 0) & (labels < z.shape[1])
    taken = target_scale.double().where(inside, 0)
    g = g.scatter_add(1, labels.where(inside, 0), -taken)
    return (slope * g).where((softmax_coeff != 0) | (uniform_coeff != 0), 0)


def options(columns: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    of_class, bias = torch.rand(columns, dtype=work(dtype)), torch.randn(columns, dtype=work(dtype))
    return [
        {"bias": None, "class_weight": None, "softcap": 0.0, "scale": 1.0},
        {"bias": bias, "class_weight": None, "softcap": 0.0, "scale": 0.7},
        {"bias": None, "class_weight": of_class, "softcap": 3.0, "scale": 1.0},
        {"bias": bias, "class_weight": of_class, "softcap": 3.0, "scale": 0.7},
    ]
