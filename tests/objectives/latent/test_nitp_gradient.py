"""The gradient of 1 - cos in closed form: through every projector, in every direction and at every
length."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import nitp_ops
from nitp_ops import reference
from tests.support.budget import close, outputs
from tests.support.nitp_cases import (
    EVERY_KIND,
    KINDS,
    by_hand,
    closed_form,
    matrices,
    normal,
    on,
    units,
)

BOOKS = pytest.mark.parametrize("book", [nitp_ops, reference], ids=["native", "reference"])


def problem(
    kind: str, seed: int = 0, batch: int = 2, length: int = 6
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(hidden [B, T, 5], target [B, T, 4 or 5], matrices)."""
    hidden = normal(seed, batch, length, 5).requires_grad_()
    return (
        hidden,
        normal(seed + 1, batch, length, 5 if kind == "none" else 4),
        matrices(kind, seed + 2),
    )


@given(
    st.sampled_from(KINDS),
    st.integers(1, 3),
    st.integers(2, 7),
    st.integers(0, 2**20),
    st.booleans(),
)
def test_every_gradient_is_the_closed_form_pulled_back_by_hand(kind, batch, length, seed, mean):
    """``dL/dp = -(z^ - c p^) / |p|``, then the chain rule of P: no autograd on the right-hand side."""
    hidden, target, weights = problem(kind, seed, batch, length)
    pairs = length - 1
    upstream = F.pad(normal(seed + 9, batch, pairs).abs(), (0, 1))
    rows = torch.full_like(upstream, 1 / (batch * pairs)) if mean else upstream
    losses, d_hidden, *d_weights = by_hand(
        hidden[:, :-1].flatten(0, 1), target[:, 1:].flatten(0, 1), weights, rows[:, :-1].flatten()
    )
    # the last hidden state predicts nothing
    d_hidden = F.pad(d_hidden.view(batch, pairs, -1), (0, 0, 0, 1))
    loss = losses.mean() if mean else F.pad(losses.view(batch, pairs), (0, 1))
    for book in (nitp_ops, reference):
        call = on(book.implicit_token_loss, reduction="mean" if mean else "none")
        got = outputs(call, [hidden, target, *weights], 1.0 if mean else upstream)
        for ours, paper in zip(got, [loss, d_hidden, *d_weights], strict=True):
            close(ours, paper, 1e-11)


@given(st.integers(0, 6), st.integers(2, 40), st.integers(0, 2**20))
def test_alignment_has_the_closed_form_gradient_on_both_sides(rows, width, seed):
    """``dL/dp = -(z^ - c p^) / |p|`` and, the cosine being symmetric, ``dL/dz = -(p^ - c z^) /
    |z|``."""
    p, z = (
        normal(seed, rows, width).requires_grad_(),
        normal(seed + 1, rows, width).requires_grad_(),
    )
    upstream = normal(seed + 2, rows)
    d_p, d_z = (
        upstream.unsqueeze(-1) * closed_form(*pair) for pair in ((p.detach(), z), (z.detach(), p))
    )
    for book in (nitp_ops, reference):
        _, *got = outputs(book.alignment, [p, z], upstream)
        for ours, paper in zip(got, (d_p, d_z), strict=True):
            close(ours, paper, 1e-11)


@EVERY_KIND
@pytest.mark.parametrize("shift", [0, 2])
def test_gradcheck_holds_through_every_projector_at_other_shifts(kind, shift):
    """``(L(x + e) - L(x - e)) / 2e`` is dL/dx in every input, rows left out included."""
    hidden, target, weights = problem(kind, 3)
    valid = torch.arange(12).view(2, 6) % 5 != 1
    call = on(nitp_ops.implicit_token_loss, valid=valid, shift=shift)
    assert torch.autograd.gradcheck(lambda h, *w: call(h, target, *w), (hidden, *weights))


@BOOKS
def test_the_gradient_is_orthogonal_to_the_prediction(book):
    """``p . dL/dp = 0``: a step along the gradient turns p and, to first order, never stretches it."""
    hidden, target, _ = problem("none", 4)
    gradient = torch.autograd.grad(
        book.implicit_token_loss(hidden, target, reduction="sum"), hidden
    )[0]
    assert gradient[:, :-1].norm(dim=-1).min() > 0.01
    assert (gradient * hidden).sum(-1).abs().max() < 1e-14


@BOOKS
@pytest.mark.parametrize(
    ("kind", "name"), [("swiglu", "up"), ("swiglu", "down"), ("linear", "down"), ("linear", "h")]
)
def test_what_only_scales_the_prediction_gets_an_orthogonal_gradient(book, kind, name):
    """P is homogeneous in x, so ``L(s x) = L(x)``, ``<x, dL/dx> = 0`` and ``dL/dx (s x) = dL/dx (x)
    / s`` (1/|p|)."""
    hidden, target, weights = problem(kind, 5)
    inputs = [hidden, target, *weights]
    place = {"h": 0, "up": 3, "down": len(inputs) - 1}[name]
    longer = [*inputs]
    longer[place] = (7 * inputs[place]).detach().requires_grad_()
    slot = 1 + [x.requires_grad for x in inputs[:place]].count(True)
    before, after = (outputs(on(book.implicit_token_loss), x) for x in (inputs, longer))
    assert (before[slot] * inputs[place]).sum().abs() < 1e-14 and before[slot].norm() > 0.01
    for index, (a, b) in enumerate(zip(before, after, strict=True)):
        close(b * 7 if index == slot else b, a, 1e-11)


@given(st.sampled_from(KINDS), st.integers(0, 2**20), st.floats(-9, 9))
def test_the_length_of_a_target_changes_neither_the_loss_nor_any_gradient(kind, seed, decades):
    """``L(p, s z) = L(p, z)`` for every s > 0, another one for each row."""
    hidden, target, weights = problem(kind, seed)
    lengths = 10 ** (
        decades
        * torch.rand(2, 6, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )
    # no row at the clamp
    eps = target.norm(dim=-1).min().item() * min(1.0, lengths.min().item()) / 2
    for book in (nitp_ops, reference):
        call = on(book.implicit_token_loss, eps=min(eps, 1e-6))
        before, after = (outputs(call, [hidden, z, *weights]) for z in (target, lengths * target))
        for a, b in zip(before, after, strict=True):
            close(a, b, 1e-11)


@EVERY_KIND
def test_a_target_of_twice_the_length_gives_the_same_bits(kind):
    """Powers of two only move the exponent, so invariance to |z| is then exact and not up to
    rounding."""
    hidden, target, weights = problem(kind, 6)
    before, after = (
        outputs(on(nitp_ops.implicit_token_loss), [hidden, z, *weights])
        for z in (target, target * 2**20)
    )
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@given(st.integers(0, 2**20), st.floats(-4, 5))
def test_the_gradient_falls_as_one_over_the_length_of_the_prediction(seed, decades):
    """``dL/dp (s p) = dL/dp (p) / s`` and ``|dL/dp| = sin(p, z) / |p|``."""
    hidden, target, _ = problem("none", seed)
    scale = 10**decades
    longer = (scale * hidden).detach().requires_grad_()
    c = units(hidden.detach()[:, :-1], target[:, 1:])[2].squeeze(-1)
    for book in (nitp_ops, reference):
        before, after = (
            outputs(on(book.implicit_token_loss, reduction="sum"), [h, target])[1]
            for h in (hidden, longer)
        )
        close(scale * after, before, 1e-11)
        close(before[:, :-1].norm(dim=-1) * hidden[:, :-1].norm(dim=-1), (1 - c * c).sqrt(), 1e-9)


@BOOKS
@EVERY_KIND
def test_a_zero_prediction_costs_one_and_moves_nothing(book, kind):
    """``P(0) = 0``: the row's loss is 1 and its gradient 0 in every input, as if the pair were not
    there."""
    hidden, target, weights = problem(kind, 7)
    zeroed = hidden.detach().clone()
    zeroed[1, 2] = 0
    zeroed.requires_grad_()
    others = torch.ones(2, 6, dtype=torch.bool)
    others[1, 2] = False
    rows = on(book.implicit_token_loss, reduction="none")(zeroed, target, *weights)
    assert rows[1, 2] == 1
    _, *every = outputs(on(book.implicit_token_loss, reduction="sum"), [zeroed, target, *weights])
    _, *without = outputs(
        on(book.implicit_token_loss, reduction="sum", valid=others), [zeroed, target, *weights]
    )
    assert (every[0][1, 2] == 0).all()
    for a, b in zip(every, without, strict=True):
        close(a, b)


@BOOKS
def test_a_zero_target_costs_one_and_pulls_nowhere(book):
    """``z^ = 0`` and ``c = 0`` in the closed form."""
    hidden, target, weights = problem("swiglu", 8)
    target[0, 3] = 0
    rows = on(book.implicit_token_loss, reduction="none")(hidden, target, *weights)
    assert rows[0, 2] == 1
    assert all(not g.any() for g in torch.autograd.grad(rows[0, 2], [hidden, *weights]))


@BOOKS
def test_the_gradient_stops_at_eps_and_the_loss_is_continuous_there(book):
    """``L = 1 - p . z^ / max(|p|, eps)``; the closed form at ``|p| = eps`` and above, zero gradient
    below."""
    direction, target, eps = F.normalize(normal(9, 1, 1, 4), dim=-1), normal(10, 1, 1, 4), 1e-3
    losses = {}
    for factor in (0.0, 0.5, 1 - 1e-9, 1 + 1e-9, 2.0):
        p = (factor * eps * direction).requires_grad_()
        loss = book.implicit_token_loss(p, target, shift=0, eps=eps)
        (gradient,) = torch.autograd.grad(loss, p)
        losses[factor] = loss.item()
        if factor < 1:
            assert not gradient.any()
        else:
            close(gradient, closed_form(p.detach(), target))
    c = units(direction, target)[2].item()
    assert (
        losses[0.0] == 1
        and losses[0.5] == pytest.approx(1 - c / 2)
        and losses[2.0] == pytest.approx(1 - c)
    )
    assert losses[1 - 1e-9] == pytest.approx(losses[1 + 1e-9], abs=1e-8)


@BOOKS
@pytest.mark.parametrize("width", [2, 9, 64])
def test_mse_of_unit_vectors_is_the_cosine_loss_with_a_pull_on_the_length(book, width):
    """``|u - v|^2 / d = 2 (1 - c) / d``; its gradient is 2/d of the cosine's, and ``2 (1 - c) / d``
    along u."""
    u = F.normalize(normal(11, 2, 5, width), dim=-1).requires_grad_()
    v = F.normalize(normal(12, 2, 5, width), dim=-1)
    losses = {
        name: on(book.implicit_token_loss, distance=name, reduction="none")(u, v)
        for name in ("cosine", "mse")
    }
    close(losses["mse"], 2 * losses["cosine"] / width)
    d_cosine, d_mse = (torch.autograd.grad(losses[name].sum(), u)[0] for name in ("cosine", "mse"))
    close(d_mse, 2 / width * d_cosine + losses["mse"].detach().unsqueeze(-1) * u, 1e-11)
