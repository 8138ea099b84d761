"""What divides a loss, and what multiplies its rows, where it is zero, infinite or no number."""

from fractions import Fraction
from typing import Any

import pytest
import torch

import nitp_ops
from nitp_ops import linear_cross_entropy
from tests.ops.cross_entropy.test_token_semantics import make


@pytest.mark.parametrize("op", ["linear_cross_entropy", "cross_entropy"])
@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("normalizer", [0.0, float("nan")])
def test_a_row_that_is_not_there_adds_zero_whatever_divides_it(op, backend, normalizer):
    hidden, weight, labels = make(rows=9, width=6, vocabulary=11)
    given = [hidden, weight] if op == "linear_cross_entropy" else [hidden @ weight.t()]

    def loss(labels):
        return getattr(nitp_ops, op)(
            *given, labels, normalizer=torch.tensor(normalizer), backend=backend
        ).item()

    assert loss(torch.full_like(labels, -100)) == 0
    some = loss(labels.clone().index_fill_(0, torch.tensor([2]), -100))
    assert some == float("inf") if normalizer == 0 else some != some


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_a_nan_upstream_of_a_row_without_weight_reaches_no_other(backend):
    hidden, weight, labels = make(rows=9, width=6, vocabulary=11)
    token_weight, upstream = torch.ones(9), torch.ones(9)
    token_weight[1], upstream[1] = 0, float("nan")
    token_weight[3], upstream[3] = float("inf"), 0
    options = {"reduction": "none", "token_weight": token_weight, "backend": backend}
    loss = nitp_ops.linear_cross_entropy(hidden, weight, labels, **options)
    for gradient in torch.autograd.grad(loss, (hidden, weight), upstream):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_normalizer_is_any_real_number(backend):
    hidden, weight, labels = make(rows=5, width=6, vocabulary=11)
    numbers: list[Any] = [10**30, Fraction(7, 2)]
    for exact in numbers:
        loss = linear_cross_entropy(hidden, weight, labels, normalizer=exact, backend=backend)
        assert torch.equal(
            loss,
            linear_cross_entropy(hidden, weight, labels, normalizer=float(exact), backend=backend),
        )


class Subclass(torch.Tensor):
    """As a tensor of another library."""


@pytest.mark.parametrize("kind", [torch.nn.Parameter, lambda x: x.as_subclass(Subclass)])
@pytest.mark.parametrize("op", ["linear_cross_entropy", "implicit_token_loss"])
def test_two_backward_passes_of_one_graph_agree_whatever_type_the_upstream_has(op, kind):
    hidden, weight, labels = make(rows=9, width=6, vocabulary=11)

    def loss():
        if op == "linear_cross_entropy":
            return linear_cross_entropy(hidden, weight, labels)
        return nitp_ops.implicit_token_loss(
            hidden[None], hidden[None].detach(), None, None, weight[:6]
        )

    upstream = torch.tensor(0.37, dtype=hidden.dtype)
    expected, again = torch.autograd.grad(loss(), (hidden, weight), upstream), loss()
    for _ in range(2):
        found = torch.autograd.grad(again, (hidden, weight), kind(upstream), retain_graph=True)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.as_subclass(torch.Tensor), b)
