"""Counts and metrics: numerators and denominators that add up over microbatches."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nitp_ops.engine.skill import unit_target_sum
from nitp_ops.objectives import NITP, Counts, Metrics, ModelInfo, Streams, build
from tests.support.objectives_cases import INFO, gradients, make_batch, pairs, project

SPEC = "ntp + 0.8*nitp + early: 0.5*nitp(target_layer=0, mask=document+label, denominator=main)"


@settings(deadline=None, max_examples=20)
@given(
    cuts=st.sets(st.integers(1, 5), max_size=4),
    valid=st.lists(st.integers(0, 7), min_size=6, max_size=6),
)
def test_microbatches_with_the_counts_of_the_window_give_the_whole_batch(
    cuts: set[int], valid: list[int]
):
    batch = make_batch(batch=6)
    batch.documents = torch.where(torch.arange(7) < torch.tensor(valid)[:, None], 0, -1)
    batch.extra["target_mask"] = torch.rand(6, 7, generator=torch.Generator().manual_seed(1)) < 0.7
    objective = build(SPEC, model=INFO)
    tensors = [*batch.leaves, *objective.parameters()]
    whole = objective(batch.streams())
    edges = [0, *sorted(cuts), 6]
    parts = [batch.part(slice(a, b)).streams() for a, b in itertools.pairwise(edges)]
    counts = objective.count(parts[0])
    for part in parts[1:]:
        counts = counts + objective.count(part)
    outs = [objective(part, counts=counts) for part in parts]
    total = torch.stack([out.loss for out in outs]).sum()
    torch.testing.assert_close(total, whole.loss, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(total, tensors), gradients(whole.loss, tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    metrics = outs[0].metrics
    for out in outs[1:]:
        metrics = metrics + out.metrics
    assert metrics.compute() == pytest.approx(whole.metrics.compute(), rel=1e-9, nan_ok=True)
    assert metrics.compute()["loss"] == pytest.approx(whole.loss.item(), rel=1e-9)


def test_the_contributions_sum_to_the_loss():
    out = build(SPEC, model=INFO)(make_batch().streams())
    metrics = out.metrics.compute()
    parts = [value for name, value in metrics.items() if name.startswith("loss/")]
    assert len(parts) == 3
    assert metrics["loss"] == pytest.approx(sum(parts)) == pytest.approx(out.loss.item())


def test_a_part_without_rows_and_a_row_without_weight_show_no_nan():
    batch = make_batch()
    batch.documents = torch.full_like(batch.ids, -1)
    empty = build("ntp + 0.5*top", model=INFO)(batch.streams()).metrics.compute()
    assert empty["ntp/loss"] == empty["top/loss"] == empty["ntp/accuracy"] == 0
    batch = make_batch()
    with torch.no_grad():
        batch.hidden[0, 2] = torch.nan
    weight = torch.ones(batch.ids.shape, dtype=torch.float64)
    weight[0, 3] = 0  # of the token that the spoilt row predicts
    out = build("ntp", model=INFO)(batch.streams(token_weight=weight))
    assert out.metrics.compute()["ntp/loss"] == pytest.approx(out.loss.item())
    inactive = build("ntp + 0*nitp", model=INFO)(
        batch.streams(token_weight=weight)
    ).metrics.compute()
    assert (
        inactive["loss/nitp"] == 0
        and inactive["loss"] == inactive["loss/ntp"]
        and math.isnan(inactive["nitp/loss"])
    )


def test_the_unweighted_mean_stands_beside_the_contribution():
    metrics = build(SPEC, model=INFO)(make_batch().streams()).metrics.compute()
    assert metrics["loss/nitp"] == pytest.approx(0.8 * metrics["nitp/loss"])


def test_accuracy_counts_the_rows_predicted_right():
    batch = make_batch()
    mask = torch.arange(7).expand(3, 7) != 3
    right = (batch.head(batch.hidden[:, :-1]).argmax(-1) == batch.ids[:, 1:]) & mask[:, 1:]
    metrics = build("ntp", model=INFO)(batch.streams(target_mask=mask)).metrics.compute()
    assert right.sum() > 0 and metrics["ntp/accuracy"] == pytest.approx(right.sum().item() / 15)


def test_a_row_without_a_target_is_never_right_whatever_the_ignore_index():
    batch = make_batch()
    labels = batch.ids.clone()
    labels[:, 2:] = -1
    metrics = build("ntp", model=INFO)(
        batch.streams(labels=labels, ignore_index=-1)
    ).metrics.compute()
    right = batch.head(batch.hidden[:, 0]).argmax(-1) == batch.ids[:, 1]
    assert metrics["ntp/count"] == 3 and metrics["ntp/accuracy"] == pytest.approx(
        right.double().mean().item()
    )


def test_constant_predictor_loss_and_skill_follow_their_definitions():
    batch = make_batch()
    with torch.no_grad():
        batch.states[1] += 2
    batch.documents = torch.tensor([[0, 0, 0, 1, 1, 1, -1]] * 3)
    objective = build("nitp", model=INFO)
    metrics = objective(batch.streams()).metrics.compute()
    positions = pairs(batch, 1)
    targets = torch.stack([batch.states[1][b, t + 1] for b, t in positions])
    predictions = torch.stack([project(objective, batch.hidden[b, t]) for b, t in positions])
    mean = (targets / targets.norm(dim=-1, keepdim=True)).mean(0)
    constant = 1 - mean.norm().item()
    assert 0 < constant < 0.5
    assert metrics["nitp/constant_predictor_loss"] == pytest.approx(constant)
    assert metrics["nitp/skill"] == pytest.approx(1 - metrics["nitp/loss"] / constant)
    assert metrics["nitp/prediction_norm"] == pytest.approx(predictions.norm(dim=-1).mean().item())
    assert metrics["nitp/target_norm"] == pytest.approx(targets.norm(dim=-1).mean().item())


def test_the_best_constant_prediction_scores_exactly_constant_predictor_loss():
    batch = make_batch()
    targets = batch.states[1][:, 1:].reshape(-1, 6)
    mean = (targets / targets.norm(dim=-1, keepdim=True)).mean(0)
    batch.hidden = mean.detach().expand(3, 7, 6).contiguous()
    metrics = build("nitp(projector=none)", model=INFO)(batch.streams()).metrics.compute()
    assert metrics["nitp/loss"] == pytest.approx(metrics["nitp/constant_predictor_loss"], rel=1e-12)
    assert metrics["nitp/skill"] == pytest.approx(0, abs=1e-12)


def test_floors_of_microbatches_are_never_averaged():
    batch = make_batch(batch=2)
    objective = build("nitp", model=INFO)
    with torch.no_grad():
        batch.states[1][0], batch.states[1][1] = 1.0, -1.0
    outs = [objective(batch.part(slice(b, b + 1)).streams()).metrics for b in range(2)]
    assert [out.compute()["nitp/constant_predictor_loss"] for out in outs] == pytest.approx(
        [0, 0], abs=1e-12
    )
    assert (outs[0] + outs[1]).compute()["nitp/constant_predictor_loss"] == pytest.approx(1)


def test_skill_has_no_value_where_the_targets_are_all_alike():
    batch = make_batch()
    with torch.no_grad():
        batch.states[1].fill_(1.0)
    metrics = build("nitp", model=INFO)(batch.streams()).metrics.compute()
    assert metrics["nitp/constant_predictor_loss"] < 1e-4 and math.isnan(metrics["nitp/skill"])


def test_only_the_cosine_distance_has_a_floor():
    metrics = build([NITP(distance="mse")], model=INFO)(make_batch().streams()).metrics.compute()
    assert (
        "nitp/constant_predictor_loss" not in metrics
        and "nitp/skill" not in metrics
        and metrics["nitp/target_norm"] > 0
    )


def test_the_sum_of_unit_targets_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch):
    target = torch.randn(2, 9, 4)
    norm = torch.nn.functional.pad(target.norm(dim=-1)[:, 1:], (0, 1))
    valid = torch.arange(9).expand(2, 9) < 7
    whole = unit_target_sum(target, norm, valid, 1, 1e-6)
    monkeypatch.setattr("nitp_ops.engine.skill._BLOCK_ELEMENTS", 24)
    torch.testing.assert_close(unit_target_sum(target, norm, valid, 1, 1e-6), whole)
    expected = torch.nn.functional.normalize(target[:, 1:8], dim=-1).sum((0, 1))
    torch.testing.assert_close(whole, expected)


def test_metrics_hold_no_graph():
    out = build(SPEC, model=INFO)(make_batch().streams())
    assert not any(
        value.requires_grad for own in out.metrics.sums.values() for value in own.values()
    )


def test_counting_needs_no_hidden_stream():
    batch = make_batch()
    counts = build(SPEC, model=INFO).count(Streams(token_ids=batch.ids))
    assert {name: value.item() for name, value in counts.items()} == {
        "ntp": 18,
        "nitp": 18,
        "early": 18,
    }
    assert all(value.dtype == torch.int64 and value.dim() == 0 for value in counts.values())


def test_counts_and_metrics_of_another_objective_are_refused():
    batch = make_batch()
    both, one = build("ntp + nitp", model=INFO), build("ntp", model=INFO)
    with pytest.raises(ValueError, match=r"counts has parts \['ntp'\], expected \['nitp', 'ntp'\]"):
        both(batch.streams(), counts=one.count(batch.streams()))
    with pytest.raises(TypeError, match="counts is a dict, expected Counts"):
        both(batch.streams(), counts=dict(both.count(batch.streams())))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Counts: other has parts"):
        _ = both.count(batch.streams()) + one.count(batch.streams())
    with pytest.raises(ValueError, match="Metrics: other has"):
        _ = both(batch.streams()).metrics + one(batch.streams()).metrics
    with pytest.raises(ValueError, match="other has group size 2, expected 1"):
        _ = Counts({"ntp": torch.tensor(1)}) + Counts({"ntp": torch.tensor(1)}, group_size=2)


def test_gradient_reduction_mean_multiplies_the_loss_and_not_the_metrics():
    batch, objective = make_batch(), build("ntp + nitp", model=INFO)
    counts = Counts(objective.count(batch.streams()), group_size=4)
    summed = objective(batch.streams(), counts=counts, gradient_reduction="sum")
    averaged = objective(batch.streams(), counts=counts)
    torch.testing.assert_close(averaged.loss, 4 * summed.loss)
    assert averaged.metrics.compute() == summed.metrics.compute()
    with pytest.raises(ValueError, match='gradient_reduction is \'max\', expected "mean" or "sum"'):
        objective(batch.streams(), gradient_reduction="max")  # type: ignore[arg-type]


def test_float32_losses_carry_the_digits_of_one_minus_cosine():
    info = ModelInfo(hidden_size=6, vocab_size=11, num_layers=5)
    base = torch.randn(1, 40, 6).bfloat16()
    streams = Streams(
        token_ids=torch.zeros(1, 40).long(), last_hidden=base, hidden_states={1: base.roll(1, 1)}
    )
    out = build("nitp(projector=none)", model=info)(streams)
    assert out.loss.dtype == torch.float32 and out.metrics.compute()["nitp/loss"] == pytest.approx(
        0, abs=1e-6
    )


def test_without_a_process_group_nothing_is_reduced():
    metrics = build("ntp", model=INFO)(make_batch().streams()).metrics
    assert isinstance(metrics, Metrics) and metrics.all_reduce() is metrics
    counts = Counts({"ntp": torch.tensor(3)})
    assert counts.all_reduce() is counts
