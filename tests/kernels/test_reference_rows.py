"""backend="reference" leaves rows out whose upstream gradient is zero, as the kernels do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import nitp_ops

NAN, INF = float("nan"), float("inf")
UPSTREAM = torch.tensor([0.7, 0.0, 0.3], dtype=torch.float64)
LABELS = torch.tensor([1, 4, 2])
DISTANCES = ["cosine", "mse", "smooth_l1", "kl"]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def token(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return nitp_ops.linear_cross_entropy(hidden, weight, LABELS, z_loss=0.1, **options)


def several(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
    targets = {"target_weight": torch.ones(3, 1, dtype=torch.float64)}
    return nitp_ops.linear_cross_entropy(hidden, weight, LABELS.unsqueeze(1), **targets, **options)


def latent(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
    targets = drawn(3, 5, seed=2)
    return nitp_ops.implicit_token_loss(hidden, targets, None, None, weight, shift=0, **options)


def shared(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return nitp_ops.grouped_linear_cross_entropy(
        [nitp_ops.CrossEntropyTerm(hidden, LABELS)], weight, **options
    )[0]


def gradients(call: Any, upstream: Tensor, hidden: Tensor, **options: Any) -> list[Tensor]:
    inputs = [hidden.clone().requires_grad_(), drawn(5, 4, seed=1).requires_grad_()]
    return [*torch.autograd.grad(call(*inputs, **options), inputs, upstream)]


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_an_alignment_of_upstream_zero_has_no_gradient_whatever_its_rows_hold(
    backend, distance, side, value
):
    rows = [drawn(3, 4, seed=0), drawn(3, 4, seed=1)]
    clean = [x.clone().requires_grad_() for x in rows]
    rows[side][1, 2] = value
    spoilt = [x.requires_grad_() for x in rows]
    found, expected = (
        torch.autograd.grad(
            nitp_ops.alignment(*each, distance=distance, backend=backend), each, UPSTREAM
        )
        for each in (spoilt, clean)
    )
    for gradient, reference in zip(found, expected, strict=True):
        assert torch.equal(gradient, reference) and not gradient[1].any()


@pytest.mark.parametrize("call", [token, several, latent], ids=lambda call: call.__name__)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_neither_has_a_row_of_a_loss_by_rows(backend: str, call: Any):
    hidden = drawn(3, 4, seed=0)
    expected = gradients(call, UPSTREAM, hidden, reduction="none", backend=backend)
    hidden[1, 2] = NAN
    found = gradients(call, UPSTREAM, hidden, reduction="none", backend=backend)
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("call", [token, several, latent, shared], ids=lambda call: call.__name__)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_an_upstream_of_zero_leaves_no_gradient(backend: str, call: Any):
    hidden = drawn(3, 4, seed=0)
    hidden[1, 2] = NAN
    for gradient in gradients(call, torch.zeros((), dtype=torch.float64), hidden, backend=backend):
        assert not gradient.any()


@pytest.mark.parametrize("call", [token, latent], ids=lambda call: call.__name__)
def test_the_reference_can_be_differentiated_twice_and_again(call: Any):
    inputs = [drawn(3, 4, seed=0).requires_grad_(), drawn(5, 4, seed=1).requires_grad_()]

    def rows(hidden: Tensor, weight: Tensor) -> Tensor:
        return call(hidden, weight, reduction="none", backend="reference")

    assert torch.autograd.gradcheck(rows, inputs) and torch.autograd.gradgradcheck(rows, inputs)
    losses = rows(*inputs)
    twice = [torch.autograd.grad(losses, inputs, UPSTREAM, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*twice, strict=True))
