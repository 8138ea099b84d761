"""NTP and NITP against their equations, written out by hand in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nitp_ops.objectives import NITP, NTP, CompositeObjective, ModelInfo, build
from tests.support.objectives_cases import (
    INFO,
    Batch,
    assert_same,
    gradients,
    make_batch,
    ntp_sum,
    pairs,
    project,
)


def unit(x: Tensor, eps: float) -> Tensor:
    """x / max(|x|, eps), without a gradient below eps."""
    return x / x.norm() if x.norm() >= eps else x.detach() / eps


def nitp_sum(
    objective: CompositeObjective, batch: Batch, term: NITP, positions: list[tuple[int, int]]
) -> Tensor:
    states = batch.states[term.layer(INFO)]
    source = batch.hidden if term.source == "last_hidden" else batch.residual
    terms = []
    for b, t in positions:
        p = project(objective, source[b, t])
        z = states[b, t + term.shift]
        z = z.detach() if term.stop_gradient else z
        if term.target_norm == "rms":
            z = z / (z.square().mean() + term.eps).sqrt()
        if term.distance == "cosine":
            terms.append(1 - unit(p, term.eps) @ unit(z, term.eps))
        elif term.distance == "mse":
            terms.append((p - z).square().mean())
        elif term.distance == "smooth_l1":
            x = (p - z).abs()
            terms.append(torch.where(x < 1, x.square() / 2, x - 0.5).mean())
        else:
            terms.append((z.softmax(-1) * (z.log_softmax(-1) - p.log_softmax(-1))).sum())
    return torch.stack(terms).sum()


def test_ntp_plus_nitp_equals_the_equations_with_every_gradient():
    batch = make_batch()
    objective = build("ntp + 0.8*nitp(target_layer=0.2)", model=INFO)
    positions = pairs(batch, 1)
    expected = ntp_sum(batch, positions) / len(positions)
    expected = expected + 0.8 * nitp_sum(objective, batch, NITP(), positions) / len(positions)
    loss = objective(batch.streams()).loss
    assert_same(loss, expected, [*batch.leaves, *objective.parameters()])


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"distance": "mse"},
        {"distance": "smooth_l1"},
        {"distance": "kl"},
        {"shift": 0},
        {"shift": 2},
        {"projector": "none"},
        {"projector": "linear"},
        {"intermediate_size": 5},
        {"eps": 2.3},
        {"target_layer": 0},
        {"target_layer": 4},
        {"target_layer": 0.5},
        {"source": "last_residual"},
        {"target_norm": "rms", "distance": "mse"},
        {"target_norm": "rms", "eps": 1e-2, "distance": "kl"},
    ],
    ids=str,
)
def test_every_option_of_nitp_equals_its_equation(
    options: dict, backend: str | None, stop_gradient: bool
):
    batch = make_batch(1)
    term = NITP(**options, stop_gradient=stop_gradient)
    objective = build([term], model=INFO, backend=backend)
    positions = pairs(batch, term.shift)
    expected = nitp_sum(objective, batch, term, positions) / len(positions)
    assert_same(
        objective(batch.streams()).loss, expected, [*batch.leaves, *objective.parameters()], 1e-11
    )


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_the_label_mask_of_nitp_takes_out_pairs_whose_target_is_masked(stop_gradient: bool):
    batch = make_batch(2)
    batch.documents = torch.tensor([[0, 0, 0, 1, 1, 1, -1]] * 3)
    batch.extra["target_mask"] = torch.rand(3, 7, generator=torch.Generator().manual_seed(0)) < 0.6
    term = NITP(mask="document+label", stop_gradient=stop_gradient)
    objective = build([term], model=INFO)
    positions = pairs(batch, 1, batch.extra["target_mask"])
    assert 0 < len(positions) < len(pairs(batch, 1))
    expected = nitp_sum(objective, batch, term, positions) / len(positions)
    assert_same(objective(batch.streams()).loss, expected, [*batch.leaves, *objective.parameters()])


def test_the_document_mask_of_nitp_ignores_the_label_mask():
    batch = make_batch(2)
    objective = build("nitp", model=INFO)
    masked = objective(batch.streams(target_mask=torch.zeros(3, 7, dtype=torch.bool))).loss
    torch.testing.assert_close(masked, objective(batch.streams()).loss)


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_a_nan_in_rows_that_do_not_count_reaches_nothing(stop_gradient: bool):
    batch = make_batch(3)
    batch.documents = torch.tensor([[0, 0, 0, 0, 0, -1, -1]] * 3)
    objective = build([NTP(), NITP(stop_gradient=stop_gradient)], model=INFO)
    clean = objective(batch.streams())
    before = gradients(clean.loss, [*batch.leaves, *objective.parameters()])
    with torch.no_grad():
        for stream in (batch.hidden, batch.states[1]):
            stream[:, 5:] = torch.nan
    spoiled = objective(batch.streams())
    after = gradients(spoiled.loss, [*batch.leaves, *objective.parameters()])
    assert torch.equal(clean.loss, spoiled.loss)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert clean.metrics.compute() == spoiled.metrics.compute()


def test_smoothing_z_loss_softcap_and_scale_follow_their_equations():
    info = ModelInfo(
        hidden_size=6,
        vocab_size=11,
        num_layers=5,
        softcap=3.0,
        logit_scale=0.7,
        dtype=torch.float64,
    )
    batch = make_batch(4)
    objective = build("ntp(label_smoothing=0.1, z_loss=0.01)", model=info)
    z = 3.0 * torch.tanh(0.7 * batch.head(batch.hidden[:, :-1]) / 3.0)
    lse = z.logsumexp(-1)
    target = z.gather(-1, batch.ids[:, 1:, None])[..., 0]
    rows = 0.9 * (lse - target) + 0.1 * (lse - z.mean(-1)) + 0.01 * lse.square()
    assert_same(objective(batch.streams()).loss, rows.mean(), batch.leaves)


def test_token_weights_belong_to_the_target_and_leave_the_count_alone():
    batch = make_batch(5)
    weight = torch.rand(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    losses = F.cross_entropy(
        batch.head(batch.hidden[:, :-1]).mT, batch.ids[:, 1:], reduction="none"
    )
    out = build("ntp", model=INFO)(batch.streams(token_weight=weight))
    assert_same(out.loss, (losses * weight[:, 1:]).sum() / 18, batch.leaves)
    assert out.metrics.compute()["ntp/count"] == 18
    assert out.metrics.compute()["ntp/loss"] == pytest.approx(out.loss.item(), rel=1e-12)


def test_the_main_denominator_divides_by_the_ntp_count():
    batch = make_batch(6)
    batch.extra["target_mask"] = torch.arange(7).expand(3, 7) < 4
    own = build("ntp + 2*nitp", model=INFO)(batch.streams()).metrics.compute()
    out = build({"ntp": {}, "nitp": {"weight": 2, "denominator": "main"}}, model=INFO)(
        batch.streams()
    )
    assert (own["ntp/count"], own["nitp/count"]) == (9, 18)
    metrics = out.metrics.compute()
    assert metrics["loss/nitp"] == pytest.approx(own["loss/nitp"] * 18 / 9, rel=1e-12)
    assert metrics["loss"] == pytest.approx(out.loss.item(), rel=1e-12)


def test_a_batch_without_any_target_gives_zero_loss_and_zero_gradients():
    batch = make_batch(7)
    batch.documents = torch.full((3, 7), -1)
    objective = build([NTP(), NITP(), NITP(label="both", stop_gradient=False)], model=INFO)
    out = objective(batch.streams())
    out.loss.backward()
    assert out.loss.item() == 0
    for tensor in (batch.hidden, *batch.head.parameters(), *objective.parameters()):
        assert tensor.grad is not None and not tensor.grad.any()


def test_rows_shorter_than_the_shift_have_no_pairs():
    batch = make_batch(8, length=2)
    for term in (NITP(shift=2), NITP(shift=3, stop_gradient=False)):
        out = build([term], model=INFO)(batch.streams())
        assert out.loss.item() == 0 and out.metrics.compute()["nitp/count"] == 0


def test_bfloat16_streams_give_the_float32_value_within_rounding():
    batch = make_batch(9, batch=4, length=32)
    info = ModelInfo(
        hidden_size=6, vocab_size=11, num_layers=5, dtype=torch.float32, initializer_range=0.5
    )
    exact = build("ntp + nitp", model=info).double()(batch.streams()).loss
    batch.hidden, batch.states = (
        batch.hidden.bfloat16(),
        {k: s.bfloat16() for k, s in batch.states.items()},
    )
    batch.head.bfloat16()
    low = build("ntp + nitp", model=info).bfloat16()(batch.streams()).loss
    assert low.dtype == torch.float32
    assert abs(low.item() - exact.item()) < 0.03 * exact.item()
