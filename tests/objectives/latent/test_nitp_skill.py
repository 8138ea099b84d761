"""What a constant prediction can reach at best, how it relates to the targets' geometry, and what
objectives report."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import nitp_ops
from nitp_ops import geometry
from nitp_ops.objectives import NITP, ModelInfo, Streams, build
from tests.support.budget import close
from tests.support.nitp_cases import normal
from tests.support.objectives_cases import INFO, make_batch, pairs

BOOKS = pytest.mark.parametrize("book", [nitp_ops, nitp_ops.reference], ids=["native", "reference"])


@st.composite
def crowds(draw: st.DrawFn) -> Tensor:
    """Targets [n, d] of any length that share an offset more or less, so that floors from 0 to 1
    occur."""
    count, width, seed = (
        draw(st.integers(2, 40)),
        draw(st.integers(2, 8)),
        draw(st.integers(0, 2**20)),
    )
    spread = normal(seed, count, width)
    return (spread + draw(st.sampled_from([0.0, 1.0, 30.0])) * normal(seed + 1, width)) * normal(
        seed + 2, count, 1
    ).exp()


def mean_unit(targets: Tensor) -> Tensor:
    return F.normalize(targets, dim=-1).mean(0)


def constant_loss(constant: Tensor, targets: Tensor, book: object = nitp_ops) -> Tensor:
    """Mean loss of one prediction for every target."""
    prediction = constant.expand_as(targets)[None]
    return book.implicit_token_loss(prediction, targets[None], shift=0)  # type: ignore[attr-defined]


@given(crowds())
def test_the_mean_direction_reaches_the_floor_and_nothing_pulls_it_away(targets):
    """``mean (1 - p^ . z^) = 1 - p^ . m``, ``m = mean z^``: least at ``p^ = m/|m|``, where it is
    ``1 - |m|``; there ``dL/dp = -(m - (p^ . m) p^)/|p| = 0``."""
    m = mean_unit(targets)
    for book in (nitp_ops, nitp_ops.reference):
        best = (2.3 * m).requires_grad_()
        loss = constant_loss(best, targets, book)
        assert loss.item() == pytest.approx(1 - m.norm().item(), abs=1e-12)
        gradient = torch.autograd.grad(loss, best)[0]
        assert gradient.norm() * best.norm() < 1e-12


@given(
    crowds(),
    st.integers(0, 2**20),
    st.sampled_from([1e-3, 1.0, 1e3]),
    st.sampled_from([0.0, 1e-3, 1.0]),
)
def test_no_constant_does_better_than_the_floor(targets, seed, length, closeness):
    """``1 - p^ . m >= 1 - |m|`` by Cauchy-Schwarz, for p of any direction and length, near the best
    one too."""
    m = mean_unit(targets)
    constant = length * (
        normal(seed, m.numel()) * (closeness or 1.0) + (m / m.norm() if closeness else 0.0)
    )
    loss = constant_loss(constant, targets).item()
    assert loss >= 1 - m.norm().item() - 1e-12
    assert loss == pytest.approx(1 - (F.normalize(constant, dim=0) @ m).item(), abs=1e-12)


@given(crowds())
def test_the_floor_is_the_mean_pairwise_cosine_in_another_form(targets):
    """``|mean z^|^2 = (1 + (n - 1) C) / n``, C the mean cosine over ordered pairs i != j, so
    ``C = (n |m|^2 - 1) / (n - 1)``: "about equal" is short by ``(1 - C) / n``."""
    n, unit = targets.shape[0], F.normalize(targets, dim=-1)
    square = mean_unit(targets).square().sum().item()
    cosines = unit @ unit.T
    every_pair = (cosines.sum() - cosines.diagonal().sum()).item() / (n * (n - 1))
    assert (n * square - 1) / (n - 1) == pytest.approx(every_pair, abs=1e-12)
    assert geometry.mean_pairwise_cosine(targets) == pytest.approx(every_pair, abs=1e-12)
    assert square - every_pair == pytest.approx((1 - every_pair) / n, abs=1e-12)


def test_targets_with_a_pairwise_cosine_of_0_89_leave_a_constant_0_057():
    """``z_i = sqrt(0.89) e_0 + sqrt(0.11) e_i`` has cosine 0.89 in every pair; ``1 - sqrt(0.89 +
    0.11/n) = 0.057``."""
    n = 999
    targets = torch.eye(n, n + 1, dtype=torch.float64).roll(1, 1) * 0.11**0.5
    targets[:, 0] = 0.89**0.5
    assert geometry.mean_pairwise_cosine(targets) == pytest.approx(0.89, abs=1e-12)
    info = ModelInfo(hidden_size=n + 1, vocab_size=2, num_layers=2, dtype=torch.float64)
    best = mean_unit(targets).expand(1, n, n + 1)
    streams = Streams(
        token_ids=torch.zeros(1, n).long(), last_hidden=best, hidden_states={1: targets[None]}
    )
    metrics = build([NITP(projector="none", shift=0)], model=info)(streams).metrics.compute()
    assert metrics["nitp/constant_predictor_loss"] == pytest.approx(
        1 - math.sqrt(0.89 + 0.11 / n), rel=1e-10
    )
    assert metrics["nitp/loss"] == pytest.approx(metrics["nitp/constant_predictor_loss"], rel=1e-10)
    assert round(metrics["nitp/constant_predictor_loss"], 3) == 0.057


@given(
    st.integers(0, 2**20),
    st.integers(0, 3),
    st.lists(st.integers(-1, 2), min_size=7, max_size=7),
    st.booleans(),
)
def test_objectives_report_the_floor_of_exactly_the_pairs_that_count(
    seed, shift, documents, stop_gradient
):
    """``constant_predictor_loss = 1 - |mean z^|`` and ``skill = 1 - loss/constant_predictor_loss`` over valid pairs; a constant's skill
    is never > 0."""
    batch = make_batch(seed)
    batch.documents = torch.tensor([documents] * 3)
    constant = normal(seed, 6)
    batch.hidden = constant.expand(3, 7, 6).contiguous().requires_grad_()
    objective = build(
        [NITP(shift=shift, projector="none", stop_gradient=stop_gradient)], model=INFO
    )
    metrics = objective(batch.streams()).metrics.compute()
    positions = pairs(batch, shift)
    assert metrics["nitp/count"] == len(positions)
    if not positions:
        assert math.isnan(metrics["nitp/skill"])
        return
    m = mean_unit(torch.stack([batch.states[1][b, t + shift] for b, t in positions]).detach())
    least, loss = 1 - m.norm().item(), 1 - (F.normalize(constant, dim=0) @ m).item()
    assert metrics["nitp/constant_predictor_loss"] == pytest.approx(least, abs=1e-12)
    assert metrics["nitp/loss"] == pytest.approx(loss, abs=1e-12)
    if least >= 1e-4:
        assert (
            metrics["nitp/skill"] == pytest.approx(1 - loss / least, abs=1e-9)
            and metrics["nitp/skill"] < 1e-9
        )
    else:
        assert math.isnan(metrics["nitp/skill"])


@BOOKS
def test_a_predictor_that_looks_at_its_input_can_pass_under_the_floor(book):
    """constant_predictor_loss bounds constants only: ``p_i = m + z_i^`` has a skill > 0 wherever the targets
    differ."""
    targets = normal(3, 20, 6) + normal(4, 6)
    m = mean_unit(targets)
    loss = book.implicit_token_loss(
        (m + F.normalize(targets, dim=-1))[None], targets[None], shift=0
    )
    assert loss < 1 - m.norm()
    close(loss, 1 - F.cosine_similarity(m + F.normalize(targets, dim=-1), targets).mean())
