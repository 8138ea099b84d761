"""implicit_token_loss: distance(P(h_t), stopgrad(s_{t+shift})),  P(h) = W_down (silu(W_gate h) *
W_up h).

The public function: signature, checks, normalisation. `chunked.py` is the chunked algorithm behind
it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...core import checks
from ...core.devices import sum_dtype
from ...kernels import select
from ..alignment import DISTANCES, AlignmentStats
from ..reference_rows import of_active_rows
from .autograd import latent_pass
from .inputs import Pairs, Projector

_OP = "implicit_token_loss"


def implicit_token_loss(
    hidden: Tensor,
    target: Tensor,
    gate: Tensor | None = None,
    up: Tensor | None = None,
    down: Tensor | None = None,
    *,
    gate_up: Tensor | None = None,
    valid: Tensor | None = None,
    shift: int = 1,
    distance: str = "cosine",
    eps: float = 1e-6,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    chunk_bytes: int | None = None,
    max_rows: int | None = None,
    hidden_grad_out: Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Any:
    """Next Implicit Token Prediction: the projected hidden state predicts the latent of the next
    token.

    ``p_t = W_down (silu(W_gate h_t) * W_up h_t)``, ``loss_t = distance(p_t,
    stopgrad(target_{t+shift}))``; for cosine ``loss_t = 1 - p.z / (|p| |z|)`` and ``dloss/dp = -(z^
    - cos p^) / |p|``.

    Rows go through in chunks; for scalar reductions gradients are computed in the forward pass
    (nine GEMMs, nothing recomputed) and nothing of size ``[N, m]`` outlives its chunk. Weight
    gradients are summed in float32.

    Under torch.compile each new value of eps compiles anew, and past
    ``torch._dynamo.config.recompile_limit`` values (8 unless set) runs eagerly, see
    `linear_cross_entropy`.

    Args:
        hidden: ``[..., T, d]`` float64, float32, bfloat16 or float16; the predictor.
        target: ``[..., T, D]``, the same leading shape, its own dtype. Row t meets row t + shift,
            by index: nothing is rolled or copied. It gets no gradient.
        gate, up: ``[m, d]``. Both None, and gate_up too: a linear projector.
        down: ``[D, m]`` (``[D, d]`` for a linear projector). None: no projector, then D = d.
        gate_up: ``[2m, d]``, gate above up, instead of them: nothing is copied, where two matrices
            that do not lie side by side in memory are joined on every call, and its gradient is
            one.
        valid: bool ``[..., T]``: the pair that starts at t counts. The last `shift` rows never do.
        shift: >= 0; 1 is the paper's, 0 the same position.
        distance: "cosine", "mse", "smooth_l1" or "kl", as in `alignment`.
        eps: lower bound of each norm (cosine).
        reduction: "mean" divides by the number of valid pairs or by `normalizer`; "sum"; "none"
            returns ``[..., T]`` with zeros where invalid. No valid pair: loss 0 and gradients 0.
        normalizer: number or 0-d tensor for "mean", e.g. the count of a whole accumulation window.
        chunk_bytes: size of one chunk's workspace; None: 120 MiB (32 MiB without gate and up), or
            512 rows up to 240 MiB; on a GPU 1.25 GiB (32 MiB without), or 8192 rows.
        max_rows: a bound on the valid pairs, for devices where the host does not know their number;
            on CPU, where invalid rows are always skipped, it is only checked.
        hidden_grad_out: a contiguous float32 buffer (float64 for float64) of hidden's shape that
            the backward pass adds the gradient into, upstream included; autograd then gives None
            for hidden.
        return_stats: also return `AlignmentStats`, ``[..., T]`` each.
        backend: None (the device decides), "native", "triton", "torch" or "reference".

    Returns:
        The loss in float32 (float64 for float64), 0-d or ``[..., T]``; with return_stats ``(loss,
        AlignmentStats)``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        BackendError: the requested backend does not serve this device.
        NotImplementedError: double backward, forward mode, torch.func transforms.

    Example:
        >>> import torch, nitp_ops
        >>> h, z = torch.ones(1, 4, 8), torch.ones(1, 4, 8)
        >>> gate, up, down = torch.ones(32, 8), torch.ones(32, 8), torch.ones(8, 32)
        >>> abs(nitp_ops.implicit_token_loss(h, z, gate, up, down).item()) < 1e-6
        True

    Source: NITP, arXiv 2605.24956.
    """
    projector = _projector(hidden, target, gate_up, gate, up, down)
    checks.one_of(_OP, "distance", distance, tuple(DISTANCES))
    checks.one_of(_OP, "reduction", reduction, checks.REDUCTIONS)
    checks.integer(_OP, "shift", shift, least=0)
    eps = checks.number(_OP, "eps", eps, least=0.0, open_end=True, dtype=reference.working(hidden))
    if chunk_bytes is not None:
        checks.integer(_OP, "chunk_bytes", chunk_bytes, least=1)
    if normalizer is not None:
        if reduction != "mean":
            raise ValueError(
                f'{_OP}: normalizer is only supported with reduction="mean", got {reduction!r}'
            )
        normalizer = checks.scalar(_OP, "normalizer", normalizer, reference.working(hidden))
    if valid is not None:
        checks.is_plain(_OP, "valid", valid)
        checks.is_tensor(_OP, "valid", valid)
        checks.has_dtype(_OP, "valid", valid, (torch.bool,))
        checks.has_shape(_OP, "valid", valid, hidden.shape[:-1], "hidden's without its last axis")
        checks.same_device(_OP, "valid", valid, "hidden", hidden)
    if max_rows is not None:
        checks.integer(_OP, "max_rows", max_rows, least=0)
    if hidden_grad_out is not None:
        checks.is_buffer(_OP, "hidden_grad_out", hidden_grad_out, "hidden", hidden)
    chosen = select.select_backend(_OP, hidden.device, backend)
    if chosen == "reference":
        if hidden_grad_out is not None:
            raise ValueError(
                f"{_OP}: hidden_grad_out is not supported with backend='reference' (it leaves "
                "gradients to autograd)"
            )
        terms = {"valid": valid, "shift": shift, "distance": distance, "eps": eps}
        gate, up = (gate, up) if gate_up is None else gate_up.chunk(2)
        weights = gate, up, down

        def formula(active: Tensor | None, hidden: Tensor, *weights: Tensor | None) -> Tensor:
            keep = valid if active is None else reference.pairs(hidden, valid, shift) & active
            options = terms | {"valid": keep, "reduction": reduction, "normalizer": normalizer}
            return reference.implicit_token_loss(hidden, target, *weights, **options)

        loss = of_active_rows(formula, hidden, *weights)
        if not return_stats:
            return loss
        return loss, AlignmentStats(*reference.alignment_stats(hidden, target, *weights, **terms))
    checks.plain_autograd(_OP, hidden, target, *projector, valid)
    keep = reference.pairs(hidden, valid, shift)
    if max_rows is not None and checks.plain(hidden) and int(keep.sum()) > max_rows:
        raise ValueError(
            f"{_OP}: max_rows is {max_rows}, expected at least {int(keep.sum())}, the valid pairs"
        )
    gaps = valid is not None or (shift > 0 and keep.numel() > keep.shape[-1])
    scale = _scale(
        hidden, target, keep if valid is not None else None, shift, reduction, normalizer
    )
    loss, stats = latent_pass(
        Pairs(hidden, target, keep.reshape(-1), scale, hidden_grad_out, shift, max_rows, gaps),
        projector,
        distance=DISTANCES[distance],
        eps=eps,
        chunk_bytes=chunk_bytes,
        backend=chosen,
        per_row=reduction == "none",
    )
    loss = loss.view(keep.shape) if reduction == "none" else loss
    if not return_stats:
        return loss
    return loss, AlignmentStats(*(row.view(keep.shape) for row in stats))


def _scale(
    hidden: Tensor, target: Tensor, keep: Tensor | None, shift: int, reduction: str, normalizer: Any
) -> Tensor:
    """0-d: what every loss is multiplied by; keep None: every pair counts that exists."""
    device, work, wide = hidden.device, reference.working(hidden, target), sum_dtype(hidden.device)
    if reduction == "mean" and normalizer is None and keep is not None:
        normalizer = keep.sum().clamp(min=1)
    if normalizer is not None:
        return (torch.ones((), dtype=wide, device=device) / normalizer).to(work)
    pairs = math.prod(hidden.shape[:-2]) * (hidden.shape[-2] - shift)
    return torch.full(
        (), 1 / max(1, pairs) if reduction == "mean" else 1.0, dtype=work, device=device
    )


def _projector(
    hidden: Tensor,
    target: Tensor,
    gate_up: Tensor | None,
    gate: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
) -> Projector:
    """Checks the tensors against each other, shapes first."""
    for name, tensor in (("hidden", hidden), ("target", target)):
        checks.is_float(_OP, name, tensor)
        checks.has_dim(_OP, name, tensor, 2, "[..., T, d]")
    if target.shape[:-1] != hidden.shape[:-1]:
        expected = (*hidden.shape[:-1], target.shape[-1])
        checks.has_shape(_OP, "target", target, expected, "hidden's leading shape")
    checks.same_device(_OP, "target", target, "hidden", hidden)
    if (gate is None) != (up is None):
        raise ValueError(
            f"{_OP}: {'gate' if gate is None else 'up'} is None, expected gate and up together or "
            "neither"
        )
    if gate_up is not None and gate is not None:
        raise ValueError(f"{_OP}: gate_up is given beside gate and up, expected one of them")
    if (gate is not None or gate_up is not None) and down is None:
        raise ValueError(
            f"{_OP}: down is None, expected [D, m] beside "
            f"{'gate and up' if gate_up is None else 'gate_up'}"
        )
    width, out = hidden.shape[-1], target.shape[-1]
    weights = {"gate_up": gate_up, "gate": gate, "up": up, "down": down}
    named = [(name, w) for name, w in weights.items() if w is not None]
    for name, weight in named:
        checks.is_float(_OP, name, weight)
        checks.has_dtype(_OP, name, weight, (named[0][1].dtype,))
        checks.same_device(_OP, name, weight, "hidden", hidden)
        if (weight.dtype == torch.float64) != (hidden.dtype == torch.float64):
            got, expected = checks.name_of(weight.dtype), checks.name_of(hidden.dtype)
            raise TypeError(
                f"{_OP}: {name} is {got}, expected {expected} (float64 does not mix "
                "with other dtypes)"
            )
    if gate is not None and up is not None:
        if gate.dim() != 2 or gate.shape[1] != width:
            raise ValueError(
                f"{_OP}: gate has shape {tuple(gate.shape)}, expected (m, {width}), hidden's width"
            )
        checks.has_shape(_OP, "up", up, gate.shape, "gate's")
    if gate_up is not None and not _holds_two(gate_up, width):
        raise ValueError(
            f"{_OP}: gate_up has shape {tuple(gate_up.shape)}, expected (2 m, {width}), hidden's "
            "width"
        )
    projector = Projector(gate if gate_up is None else gate_up, up, down)
    inner = projector.inner if projector.gate is not None else width
    if down is not None:
        checks.has_shape(_OP, "down", down, (out, inner), "target's width by the inner width")
    elif out != width:
        raise ValueError(
            f"{_OP}: target has width {out}, expected {width} (hidden's, as there is no projector)"
        )
    return projector


def _holds_two(gate_up: Tensor, width: int) -> bool:
    return gate_up.dim() == 2 and gate_up.shape[1] == width and len(gate_up) % 2 == 0
