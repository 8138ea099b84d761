"""The book of equations: every op in plain PyTorch, differentiable, slow, and right.

Scalars come back in float32 (float64 for float64 inputs); arithmetic between GEMMs runs in that
precision too. Each function has the name, arguments and meaning of the public op (whose docstring
holds shapes and sources); the arguments that only steer the execution (chunk_bytes, backend) are
absent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def working(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, rounded once."""
    dtype = working(gate)
    return (F.silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)


def power_of_two(x: Tensor) -> Tensor:
    """A power of two within a factor of two of |x|, itself and its reciprocal normal numbers; 1 for
    0, inf and NaN.

    Not by frexp, which some devices lack."""
    exponent = torch.where(torch.isfinite(x) & (x != 0), x.abs(), 1).log2().floor()
    least = torch.finfo(x.dtype).tiny
    return torch.ldexp(torch.ones_like(x), exponent.to(torch.int32)).clamp(least, 1 / least)


def in_square_range(x: Tensor) -> Tensor:
    """[..., 1], constants: a power of two for each row, times which no square overflows or all of
    them vanish."""
    largest = torch.linalg.vector_norm(x.detach(), ord=torch.inf, dim=-1, keepdim=True)
    return 1 / power_of_two(largest)


def norm(x: Tensor) -> Tensor:
    """|x| of the last axis, also where x.x would overflow; gradient 0 at 0."""
    size = in_square_range(x)
    return torch.linalg.vector_norm(x * size, dim=-1) / size.squeeze(-1)


def cosine(prediction: Tensor, target: Tensor, eps: float = 1e-6) -> Tensor:
    """p.z / (max(|p|, eps) max(|z|, eps)); a side whose norm is below eps gets no gradient."""

    def unit(x: Tensor) -> Tensor:
        size = in_square_range(x)
        x, least = x * size, eps * size
        square = x.square().sum(-1, keepdim=True)
        clamped = square.sqrt() < least
        # sqrt has an infinite slope at 0
        norm = torch.where(clamped, torch.ones_like(square), square).sqrt()
        return torch.where(clamped, x.detach() / least, x / norm)

    dtype = working(prediction, target)
    return (unit(prediction.to(dtype)) * unit(target.to(dtype))).sum(-1)


def alignment(
    prediction: Tensor, target: Tensor, *, distance: str = "cosine", eps: float = 1e-6
) -> Tensor:
    """Per-row distance over the last axis: 1 - cos | mean square | mean smooth-L1 | KL(softmax z ||
    softmax p)."""
    dtype = working(prediction, target)
    if distance == "cosine":
        return 1 - cosine(prediction, target, eps)
    p, z = prediction.to(dtype), target.to(dtype)
    if distance == "mse":
        return (p - z).square().mean(-1)
    if distance == "smooth_l1":
        return F.smooth_l1_loss(p, z, reduction="none").mean(-1)
    if distance == "kl":
        log_q_p, log_q_z = p.log_softmax(-1), z.log_softmax(-1)
        q_z = log_q_z.exp()
        return (q_z * (log_q_z - log_q_p).masked_fill(q_z == 0, 0)).sum(-1)  # 0 log 0 = 0
    raise ValueError(
        f"alignment: distance is {distance!r}, expected 'cosine', 'mse', 'smooth_l1' or 'kl'"
    )


def projection(
    hidden: Tensor,
    gate: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
    swiglu: Callable[[Tensor, Tensor], Tensor] = swiglu,
) -> Tensor:
    """W_down (silu(W_gate h) * W_up h); without gate and up: W_down h; without any: h.

    gate alone is both, ``[2 m, d]``: one GEMM. swiglu: as the function above."""
    if down is None:
        return hidden
    hidden = hidden.to(down.dtype)
    if gate is None:
        return F.linear(hidden, down)
    first = F.linear(hidden, gate)
    both = first.chunk(2, -1) if up is None else (first, F.linear(hidden, up))
    return F.linear(swiglu(*both), down)


def pairs(hidden: Tensor, valid: Tensor | None, shift: int) -> Tensor:
    """bool [..., T]: the pair (t, t + shift) exists and counts."""
    length = hidden.shape[-2]
    inside = torch.arange(length, device=hidden.device) < length - shift
    return inside.expand(hidden.shape[:-1]) if valid is None else inside & valid


def reduce(rows: Tensor, counts: Tensor, reduction: str, normalizer: Any) -> Tensor:
    """Sum of `rows`, divided for "mean" by the number of rows that count or by `normalizer`."""
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if normalizer is None:
        normalizer = counts.sum().clamp(min=1)
    # no row that counts: 0, whatever divides it
    return torch.where(counts.any(), rows.sum() / normalizer, rows.sum()).to(rows.dtype)


def implicit_token_loss(
    hidden: Tensor, target: Tensor, gate: Tensor | None = None, up: Tensor | None = None,
    down: Tensor | None = None, *, valid: Tensor | None = None, shift: int = 1,
    distance: str = "cosine", eps: float = 1e-6, reduction: str = "mean", normalizer: Any = None,
) -> Tensor:  # fmt: skip
    """distance(P(hidden[t]), stopgrad(target[t + shift])) over the valid pairs."""
    keep = pairs(hidden, valid, shift)
    rows = torch.zeros(keep.shape, dtype=working(hidden, target), device=hidden.device)
    shifted = target.detach().roll(-shift, -2)  # what wraps around is not in `keep`
    prediction = projection(hidden[keep], gate, up, down)
    losses = alignment(prediction, shifted[keep], distance=distance, eps=eps)
    rows = rows.masked_scatter(keep, losses.to(rows.dtype))
    return reduce(rows, keep, reduction, normalizer)


@torch.no_grad()
def alignment_stats(
    hidden: Tensor, target: Tensor, gate: Tensor | None = None, up: Tensor | None = None,
    down: Tensor | None = None, *, valid: Tensor | None = None, shift: int = 1,
    distance: str = "cosine", eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Per pair: loss, cosine, |prediction|, |target|; zeros where invalid."""
    keep = pairs(hidden, valid, shift)
    dtype = working(hidden, target)
    p = projection(hidden[keep], gate, up, down).to(dtype)
    z = target.roll(-shift, -2)[keep].to(dtype)
    rows = alignment(p, z, distance=distance, eps=eps), cosine(p, z, eps), norm(p), norm(z)
    empty = torch.zeros(keep.shape, dtype=dtype, device=hidden.device)
    loss, cos, p_norm, z_norm = (empty.masked_scatter(keep, row.to(dtype)) for row in rows)
    return loss, cos, p_norm, z_norm


def transformed_logits(
    hidden: Tensor,
    unembedding: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """cap tanh(scale (W h + b) / cap), the GEMM in W's dtype, the rest in float32 (float64 for
    float64).

    No W: h are the logits."""
    logits = hidden if unembedding is None else F.linear(hidden.to(unembedding.dtype), unembedding)
    logits = logits.to(working(logits))
    z = logits if bias is None else logits + bias.to(logits.dtype)
    z = z if logit_scale == 1 else logit_scale * z
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def linear_cross_entropy(
    hidden: Tensor, unembedding: Tensor | None, labels: Tensor, *, bias: Tensor | None = None,
    ignore_index: int = -100, reduction: str = "mean", target_weight: Tensor | None = None,
    token_weight: Tensor | None = None, class_weight: Tensor | None = None,
    label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None,
    logit_scale: float = 1.0, normalizer: Any = None,
) -> Tensor:  # fmt: skip
    """w [(1 - e) sum_k w_k (lse - z_k) + e sum_v u_v (lse - z_v) + c lse^2],  z = cap tanh(scale (W
    h + b) / cap).

    u_v = S / V with S = sum_k w_k, or class_weight_v / V; a plain label is one target of weight 1
    or class_weight."""
    work = working(hidden if unembedding is None else unembedding)
    if target_weight is None:
        labels = labels.unsqueeze(-1)
        present = labels != ignore_index
        target_weight = torch.ones(labels.shape, dtype=work, device=labels.device)
        if class_weight is not None:
            target_weight = class_weight.to(work)[labels.where(present, 0)]
    else:
        present = (labels != ignore_index) & (labels >= 0)
    counted = present.any(-1)
    weights = target_weight.to(work).where(present, 0)
    # rows of weight zero are left out, not multiplied: zero times NaN is NaN
    keep = counted if token_weight is None else counted & (token_weight.expand(counted.shape) != 0)
    if z_loss == 0 and (class_weight is None or label_smoothing == 0):
        keep = keep & (weights != 0).any(-1)
    z = transformed_logits(hidden[keep], unembedding, bias, softcap, logit_scale)
    lse, w = z.logsumexp(-1), weights[keep]
    gaps = lse.unsqueeze(-1) - z.gather(-1, labels.where(present, 0)[keep])
    loss = (1 - label_smoothing) * (w * gaps.masked_fill(w == 0, 0)).sum(-1)
    if label_smoothing:  # not 0 * (lse - mean z): a logit may be -inf
        gap = lse.unsqueeze(-1) - z
        if class_weight is None:
            smooth = w.sum(-1) * gap.mean(-1)
        else:
            smooth = (class_weight.to(work) * gap).mean(-1)
        loss = loss + label_smoothing * smooth
    if z_loss:
        loss = loss + z_loss * lse.square()
    if token_weight is not None:
        loss = loss * token_weight.to(work).expand(counted.shape)[keep]
    rows = torch.zeros(counted.shape, dtype=loss.dtype, device=loss.device)
    rows = rows.masked_scatter(keep, loss)
    if class_weight is not None and normalizer is None:
        total = weights.sum()
        normalizer = torch.where(total == 0, 1, total)
    return reduce(rows, counted, reduction, normalizer)


def cross_entropy(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """`linear_cross_entropy` with W h = logits."""
    return linear_cross_entropy(logits, None, labels, **options)


def token_stats(
    term: Any,
    unembedding: Tensor | None,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per row: loss before token_weight, log-sum-exp, arg-max, target logit(s), entropy; 0, NaN,
    -1, NaN, NaN where absent."""
    options: dict[str, Any] = {"bias": bias, "ignore_index": ignore_index}
    options |= {"softcap": softcap, "logit_scale": logit_scale}
    names = ("label_smoothing", "z_loss", "target_weight", "class_weight")
    terms = {name: getattr(term, name) for name in names}
    loss = linear_cross_entropy(
        term.hidden, unembedding, term.labels, reduction="none", **terms, **options
    )
    z = transformed_logits(term.hidden, unembedding, bias, softcap, logit_scale)
    if term.target_weight is None:
        present = term.labels != ignore_index
        picked = z.gather(-1, term.labels.where(present, 0).unsqueeze(-1)).squeeze(-1)
        keep = present
    else:
        present = (term.labels != ignore_index) & (term.labels >= 0)
        picked = z.gather(-1, term.labels.where(present, 0))
        keep = present.any(-1)
    nan, lse = torch.full_like(loss, float("nan")), z.logsumexp(-1)
    p = (z - lse.unsqueeze(-1)).exp()
    entropy = (p * (lse.unsqueeze(-1) - z).masked_fill(p == 0, 0)).sum(-1)
    absent = torch.full_like(picked, float("nan"))
    return (
        loss,
        lse.where(keep, nan),
        z.argmax(-1).where(keep, -1),
        picked.where(present, absent),
        entropy.where(keep, nan),
    )


def grouped_linear_cross_entropy(
    terms: Sequence[Any], unembedding: Tensor, **options: Any
) -> Tensor:
    """Sum over terms of the weighted row losses against one unembedding."""
    names = ("token_weight", "label_smoothing", "z_loss", "target_weight", "class_weight")
    losses = [
        linear_cross_entropy(
            term.hidden,
            unembedding,
            term.labels,
            reduction="sum",
            **{name: getattr(term, name) for name in names},
            **options,
        )
        for term in terms
    ]
    return torch.stack(losses).sum()
