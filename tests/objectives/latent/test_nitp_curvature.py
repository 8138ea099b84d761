"""Lemma 3.1 and theorem 3.2 of the NITP paper: the curvature of 1 - cos, and what it adds to
next-token prediction."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import nitp_ops
from nitp_ops import reference
from tests.support.budget import close
from tests.support.nitp_cases import (
    EVERY_KIND,
    closed_form,
    gate_up_down,
    matrices,
    normal,
    on,
    units,
)

LAMBDA = 0.8


def row(
    book: object, target: Tensor, kind: str = "none", weights: list[Tensor] | None = None
) -> Callable[..., Tensor]:
    """h [d] -> ``1 - cos(P(h), target)``."""
    call = on(book.implicit_token_loss, shift=0, distance="cosine")  # type: ignore[attr-defined]
    return lambda h: call(h[None, None], target[None, None], *(weights or []))


def hessian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    found = torch.autograd.functional.hessian(function, x.detach())
    assert isinstance(found, Tensor)
    return found


def slope(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    """The Hessian of `function`, column by column: ``(g(x + e) - g(x - e)) / 2e``, g its gradient.

    At 1e-5 the formula's own error, about ``step^2`` third derivatives, and float64's, 1e-16 /
    step, are 1e-10."""

    def gradient(at: Tensor) -> Tensor:
        leaf = at.detach().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf)[0]

    moves = step * torch.eye(x.numel(), dtype=x.dtype)
    return torch.stack(
        [(gradient(x + move) - gradient(x - move)) / (2 * step) for move in moves], dim=1
    )


def lemma(p: Tensor, z: Tensor) -> Tensor:
    """``H = (1/r^2) [c (I - u u') + u A' + A u']``, ``A = v - c u``."""
    u, v, c, r = units(p, z)
    a = v - c * u
    return (c * (torch.eye(p.numel(), dtype=p.dtype) - u.outer(u)) + u.outer(a) + a.outer(u)) / r**2


def pair(width: int, cosine: float, length: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(p, z) at this cosine; p of this length, z of another."""
    u, other = torch.linalg.qr(normal(seed, width, 2))[0].unbind(1)
    return length * u, 1.7 * (cosine * u + (1 - cosine**2) ** 0.5 * other)


def orthogonal(seed: int, *others: Tensor) -> Tensor:
    """A random unit vector orthogonal to the rows of `others`."""
    basis = torch.linalg.qr(torch.cat([x.reshape(-1, x.shape[-1]) for x in others]).T)[0]
    w = normal(seed, basis.shape[0])
    for _ in range(2):  # once leaves what rounding keeps of a w that lies almost in their span
        w = F.normalize(w - basis @ (basis.T @ w), dim=0)
    return w


GEOMETRIES = st.tuples(
    st.integers(3, 9),
    st.floats(-0.99, 0.99),
    st.sampled_from([0.3, 1.0, 4.0]),
    st.integers(0, 2**20),
)


@given(GEOMETRIES)
def test_lemma_3_1_gives_the_hessian_of_the_equation_and_of_the_kernel(geometry):
    """``H = (1/r^2) [c (I - u u') + u A' + A u']`` with ``r = |p|, u = p^, v = z^, A = v - c u``.

    The reference is differentiated twice by autograd; the kernel's gradient, which has no second
    derivative of its own, by central differences."""
    p, z = pair(*geometry)
    close(hessian(row(reference, z), p), lemma(p, z), 1e-11)
    close(slope(row(nitp_ops, z), p), lemma(p, z), 1e-7)
    close(slope(lambda x: nitp_ops.alignment(x, z), p), lemma(p, z), 1e-7)


@given(GEOMETRIES)
def test_the_loss_is_flat_along_the_prediction_and_h_u_is_the_pull(geometry):
    """``u'Hu = 0`` and ``Hu = A/r^2 = -(dL/dp)/r``: the gradient's fall as 1/r, seen as curvature."""
    p, z = pair(*geometry)
    u, v, c, r = units(p, z)
    for h in (hessian(row(reference, z), p), slope(row(nitp_ops, z), p)):
        assert (u @ h @ u).abs() < 1e-6 / r**2
        close(h @ u, (v - c * u) / r**2, 1e-6)
        close(h @ u, -closed_form(p, z) / r, 1e-6)


@given(GEOMETRIES)
def test_across_the_prediction_the_curvature_is_the_cosine(geometry):
    """``w'Hw = c/r^2`` for *every* unit w orthogonal to u, along A as well as across it.

    A enters through ``u A' + A u'`` only, and ``u'w = 0`` takes both out of the quadratic form;
    what it leaves is ``Hw = (c w + (A'w) u) / r^2``, so w is an eigenvector only where ``A'w =
    0``."""
    p, z = pair(*geometry)
    u, v, c, r = units(p, z)
    a = v - c * u
    along, slanted = F.normalize(a, dim=0), orthogonal(1, p)
    for h, tolerance in (
        (hessian(row(reference, z), p), 1e-12),
        (slope(row(nitp_ops, z), p), 1e-6),
    ):
        for w in (along, slanted, orthogonal(2, p, z)):
            assert (w @ h @ w * r**2 - c).abs() < tolerance * 10
            assert ((h @ w) * r**2 - c * w - (a @ w) * u).norm() < tolerance * 10
    assert (a @ orthogonal(2, p, z)).abs() < 1e-12 < (a @ along).abs()


@given(GEOMETRIES)
def test_the_spectrum_is_the_cosine_and_one_pair_of_opposite_signs(geometry):
    """``r^2 H`` has c with multiplicity d - 2 and ``(c +- sqrt(4 - 3 c^2)) / 2`` on the plane of u
    and A.

    Their product is ``-|A|^2 = c^2 - 1 < 0``: away from ``A = 0`` the Hessian is indefinite at any
    c, and theorem 3.2 speaks of directions orthogonal to u, not of positive definiteness."""
    p, z = pair(*geometry)
    c, r = (x.squeeze() for x in units(p, z)[2:])
    root = (4 - 3 * c * c).sqrt()
    expected = (
        torch.cat([c.expand(p.numel() - 2), torch.stack([(c - root) / 2, (c + root) / 2])])
        .sort()
        .values
    )
    for h, tolerance in (
        (hessian(row(reference, z), p), 1e-11),
        (slope(row(nitp_ops, z), p), 1e-6),
    ):
        close(torch.linalg.eigvalsh((h + h.T) / 2) * r**2, expected, tolerance)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("book", [nitp_ops, reference], ids=["native", "reference"])
def test_only_a_prediction_on_the_target_s_line_leaves_h_u_zero(book, sign):
    """``Hu = A/r^2`` vanishes only at ``A = 0``: then ``c = +-1`` and ``H = +-(I - u u')/r^2``, a
    minimum or a maximum.

    ``|A|^2 = 1 - c^2`` says how far: at any other cosine ``|Hu| = sqrt(1 - c^2)/r^2``."""
    p, z = normal(3, 6), 2.5 * sign * normal(3, 6)
    u, _, _, r = units(p, z)
    h = hessian(row(book, z), p) if book is reference else slope(row(book, z), p)
    assert (h @ u).norm() * r**2 < 1e-6
    close(h * r**2, sign * (torch.eye(6, dtype=p.dtype) - u.outer(u)), 1e-6)
    for cosine in (0.999, 0.5, 0.0, -0.999):
        p, z = pair(6, cosine, 2.0)
        h = hessian(row(book, z), p) if book is reference else slope(row(book, z), p)
        close((h @ p / 2).norm() * 4, torch.tensor((1 - cosine**2) ** 0.5), 1e-5)


def next_token_loss(book: object, unembedding: Tensor) -> Callable[[Tensor], Tensor]:
    """h [d] -> ``-log softmax(W h)[2]``."""
    label = torch.tensor([2])
    return lambda h: book.linear_cross_entropy(h[None], unembedding, label)  # type: ignore[attr-defined]


@pytest.mark.parametrize("cosine", [0.9, 0.2, -0.4])
@pytest.mark.parametrize("book", [nitp_ops, reference], ids=["native", "reference"])
def test_theorem_3_2_nitp_bends_the_directions_that_next_token_prediction_leaves_flat(book, cosine):
    """``w'H_NTP w = 0`` for w orthogonal to every row of W; there ``w'(H_NTP + lambda H)w = lambda
    c/r^2``.

    Positive where ``c > 0``, and negative where ``c < 0``: the theorem needs its condition. For the
    identity projector h is p. With a projector P the Hessian in h is ``J'HJ + sum_i (dL/dp_i)
    d2P_i/dh2``, J = dP/dh: in the first term ``Jw`` takes the place of w (a w that P does not see
    gains nothing), the second is P's own curvature, of either sign, zero for a linear P and
    wherever the prediction is right (``dL/dp = 0``)."""
    p, z = pair(9, cosine, 1.3)
    unembedding = normal(4, 5, 9)
    w = orthogonal(5, unembedding, p)
    token, latent = next_token_loss(book, unembedding), row(book, z)
    find = hessian if book is reference else slope
    h_token, h_both = find(token, p), find(lambda h: token(h) + LAMBDA * latent(h), p)
    r = p.norm()
    assert h_token.norm() > 0.1 and (w @ h_token @ w).abs() < 1e-9
    close(w @ h_both @ w, LAMBDA * torch.tensor(cosine, dtype=p.dtype) / r**2, 1e-6)
    assert ((w @ h_both @ w) > 0) == (cosine > 0)


def test_a_direction_that_the_unembedding_sees_is_bent_by_both():
    """``w'H_NTP w = w'W'(diag q - q q')W w > 0``, q = softmax(W h): other directions are not flat."""
    p, unembedding = normal(3, 9), normal(4, 5, 9)
    w = F.normalize(unembedding[0] - unembedding[1], dim=0)
    q = (unembedding @ p).softmax(0)
    by_hand = w @ unembedding.T @ (q.diag() - q.outer(q)) @ unembedding @ w
    close(w @ hessian(next_token_loss(reference, unembedding), p) @ w, by_hand)
    assert by_hand > 0.1


@EVERY_KIND
def test_a_projector_pulls_the_hessian_back_and_adds_its_own_curvature(kind):
    """``d2L/dh2 = J'HJ + sum_i (dL/dp_i) d2P_i/dh2``, J = dP/dh; the second term is zero where P is
    linear."""
    h, z, weights = (
        normal(6, 5),
        normal(7, 5 if kind == "none" else 4),
        [w.detach() for w in matrices(kind, 8)],
    )

    def projected(x: Tensor) -> Tensor:
        return reference.projection(x, *gate_up_down(weights))

    p = projected(h)
    jacobian = torch.autograd.functional.jacobian(projected, h)
    assert isinstance(jacobian, Tensor)
    pulled_back = jacobian.T @ lemma(p, z) @ jacobian
    own = hessian(lambda x: projected(x) @ closed_form(p, z), h)
    assert (own.norm() > 0.01) == (kind == "swiglu")
    close(hessian(row(reference, z, kind, weights), h), pulled_back + own, 1e-10)
    close(slope(row(nitp_ops, z, kind, weights), h), pulled_back + own, 1e-6)


def test_a_right_prediction_leaves_only_the_pulled_back_curvature():
    """At ``dL/dp = 0`` (c = 1) the Hessian in h is ``J'(I - u u')J / r^2``, positive semidefinite
    for any projector."""
    h, weights = normal(9, 5), [w.detach() for w in matrices("swiglu", 10)]
    gate, up, down = weights
    p = reference.projection(h, gate, up, down)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: reference.projection(x, gate, up, down), h
    )
    assert isinstance(jacobian, Tensor)
    h_all = slope(row(nitp_ops, 3 * p, "swiglu", weights), h)
    close(h_all, jacobian.T @ lemma(p, 3 * p) @ jacobian, 1e-6)
    assert torch.linalg.eigvalsh((h_all + h_all.T) / 2).min() > -1e-6
