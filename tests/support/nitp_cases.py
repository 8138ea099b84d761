"""What the proofs of NITP share: projectors of every kind, and the mathematics written out without
autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

KINDS = ("swiglu", "linear", "none")
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Float64 draws of N(0, scale^2) that depend on the seed alone."""
    return scale * torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def matrices(kind: str, seed: int, width: int = 5, out: int = 4, inner: int = 8) -> list[Tensor]:
    """[gate, up, down], [down] or [], each with a gradient; of a size that keeps predictions near
    length 1."""
    shapes = {
        "swiglu": [(inner, width), (inner, width), (out, inner)],
        "linear": [(out, width)],
        "none": [],
    }[kind]
    return [
        normal(seed + place, *shape, scale=shape[-1] ** -0.5).requires_grad_()
        for place, shape in enumerate(shapes)
    ]


def gate_up_down(weights: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The matrices of any kind in the order of the ops' arguments, None where a kind has none."""
    if len(weights) == 3:
        return weights[0], weights[1], weights[2]
    return None, None, weights[0] if weights else None


def on(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """function(hidden, target, *matrices) of any kind, with these options."""
    return lambda hidden, target, *weights: function(
        hidden, target, *gate_up_down(weights), **options
    )


def units(p: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(p^, z^, c, |p|) of rows, the last two with a last axis of one."""
    length = p.norm(dim=-1, keepdim=True)
    u, v = p / length, z / z.norm(dim=-1, keepdim=True)
    return u, v, (u * v).sum(-1, keepdim=True), length


def closed_form(p: Tensor, z: Tensor) -> Tensor:
    """``dL/dp = -(z^ - c p^) / |p|`` for every row of ``L = 1 - cos(p, z)``."""
    u, v, c, length = units(p, z)
    return -(v - c * u) / length


def by_hand(h: Tensor, z: Tensor, weights: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """[row losses, d h, d weights...] of ``sum upstream (1 - cos(P(h), z))`` by the chain rule;
    rows [n, d] and [n, D].

    ``a = silu(g) u``, ``p = W_down a``: ``dW_down = dp' a``, ``da = dp W_down``, ``du = da
    silu(g)``, ``dg = da u s (1 + g (1 - s))`` with ``s = sigmoid(g)``, ``dW = d' h``, ``dh = dg
    W_gate + du W_up``.
    """
    h, weights = h.detach(), [w.detach() for w in weights]
    if len(weights) == 3:
        gate, up, down = weights
        g, u = h @ gate.T, h @ up.T
        s = g.sigmoid()
        a = g * s * u
        p = a @ down.T
    else:
        a, p = h, h @ weights[0].T if weights else h
    d_p = upstream.unsqueeze(-1) * closed_form(p, z)
    losses = 1 - units(p, z)[2].squeeze(-1)
    if not weights:
        return [losses, d_p]
    d_a = d_p @ weights[-1]
    if len(weights) == 1:
        return [losses, d_a, d_p.T @ a]
    d_g, d_u = d_a * u * s * (1 + g * (1 - s)), d_a * g * s  # type: ignore[possibly-undefined]
    return [losses, d_g @ gate + d_u @ up, d_g.T @ h, d_u.T @ h, d_p.T @ a]  # type: ignore[possibly-undefined]
