"""TOP against the dense list-net loss over the whole vocabulary, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nitp_ops.objectives import TOP, CompositeObjective, ModelInfo, SpecError, build, parse
from tests.support.objectives_cases import INFO, Batch, assert_same, gradients, make_batch, pairs


def scores(batch: Batch, window: int, b: int, t: int) -> Tensor:
    """y [V]: window - distance of the nearest target, x_{t+1} at distance 0; -inf without one."""
    y = torch.full((INFO.vocab_size,), -torch.inf, dtype=torch.float64)
    for k in reversed(range(1, window + 1)):
        if (b, t) in pairs(batch, k, batch.extra.get("target_mask")):
            y[batch.ids[b, t + k]] = window - (k - 1)
    return y


def list_net(objective: CompositeObjective, batch: Batch, window: int) -> Tensor:
    (head,) = objective.parameters()
    losses = []
    for b, t in pairs(batch, 0):
        y = scores(batch, window, b, t)
        if y.isfinite().any():
            losses.append(-(y.softmax(-1) * (head @ batch.hidden[b, t]).log_softmax(-1)).sum())
    return torch.stack(losses).mean() if losses else batch.hidden.sum() * 0


@settings(max_examples=30)
@given(
    window=st.integers(1, 9), seed=st.integers(0, 99), backend=st.sampled_from([None, "reference"])
)
def test_it_equals_the_dense_list_net_loss(window: int, seed: int, backend: str | None):
    batch = make_batch(seed)
    draw = torch.Generator().manual_seed(seed)
    batch.ids = batch.ids % 4  # tokens repeat
    # documents need not be contiguous
    batch.documents = torch.randint(-1, 3, (3, 7), generator=draw)
    batch.extra["target_mask"] = torch.rand(3, 7, generator=draw) < 0.7
    objective = build([TOP(window=window)], model=INFO, backend=backend)
    out = objective(batch.streams())
    assert_same(
        out.loss, list_net(objective, batch, window), [*batch.leaves, *objective.parameters()]
    )
    rows = sum(scores(batch, window, b, t).isfinite().any().item() for b, t in pairs(batch, 0))
    assert out.metrics.compute()["top/count"] == rows


def test_a_repeated_token_counts_once_at_its_nearest_place():
    batch = make_batch(batch=1)
    batch.ids = torch.tensor([[0, 5, 5, 3, 5, 3, 1]])
    y = scores(batch, 4, 0, 0)
    assert (y[5].item(), y[3].item(), y.isfinite().sum().item()) == (4, 2, 2)
    objective = build([TOP(window=4)], model=INFO)
    assert_same(objective(batch.streams()).loss, list_net(objective, batch, 4), [*batch.leaves])


def test_a_masked_nearest_occurrence_leaves_the_next_one():
    batch = make_batch(batch=1)
    batch.ids = torch.tensor([[0, 5, 5, 3, 5, 3, 1]])
    batch.extra["target_mask"] = torch.tensor([[True, False, True, True, True, True, True]])
    assert scores(batch, 4, 0, 0)[5].item() == 3
    objective = build([TOP(window=4)], model=INFO)
    assert_same(objective(batch.streams()).loss, list_net(objective, batch, 4), [*batch.leaves])


def test_pre_shifted_labels_give_the_loss_of_the_longer_row():
    longer = make_batch(length=8)
    longer.extra["target_mask"] = torch.rand(3, 8) < 0.7
    objective = build([TOP(window=5)], model=INFO)
    expected = objective(longer.streams()).loss
    changes = {
        "token_ids": longer.ids[:, :-1],
        "last_hidden": longer.hidden[:, :-1],
        "last_residual": None,
    }
    labels = longer.ids.masked_fill(~longer.extra.pop("target_mask"), -100)[:, 1:]
    streams = longer.streams(**changes, hidden_states={}, shift_labels=labels)
    assert_same(objective(streams).loss, expected, [longer.hidden, *objective.parameters()])


@pytest.mark.parametrize(
    ("compat", "expected"),
    [("none", [0.632, 0.233, 0.086, 0.031]), ("fp16_scores", [0.456, 0.456, 0.062, 0.008])],
)
def test_half_precision_scores_give_the_weights_of_the_published_builders(
    compat: str, expected: list[float]
):
    term = parse(f"top(window=4096, compat={compat})").terms[0]
    assert isinstance(term, TOP)
    weights = term.target_weights(
        torch.ones(1, 1, 4096, dtype=torch.bool), torch.arange(1, 4097), torch.float64
    )[0, 0]
    torch.testing.assert_close(
        weights[:4], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-4
    )
    assert weights.sum().item() == pytest.approx(1)


def test_half_precision_changes_nothing_at_the_default_window():
    streams = make_batch().streams()
    exact, compat = (
        build(f"top(compat={c})", model=INFO)(streams).loss for c in ("none", "fp16_scores")
    )
    assert torch.equal(exact, compat)


def test_the_weights_of_far_targets_do_not_vanish_for_want_of_near_ones():
    present = torch.zeros(1, 1, 300, dtype=torch.bool)
    present[..., 250:252] = True
    weights = TOP(window=300).target_weights(present, torch.arange(1, 301), torch.bfloat16)[0, 0]
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights[250:252], torch.tensor([1.0, 0.0]).softmax(-1))


def test_a_row_without_a_target_has_no_weights_and_does_not_count():
    assert (
        not TOP()
        .target_weights(torch.zeros(1, 2, 3, dtype=torch.bool), torch.arange(1, 4), torch.float32)
        .any()
    )
    batch, objective = make_batch(length=1), build("top", model=INFO)
    out = objective(batch.streams())
    assert out.loss.item() == 0 and out.metrics.compute()["top/count"] == 0


@pytest.mark.parametrize("backend", [None, "reference"])
def test_token_weights_multiply_the_weight_of_each_target(backend: str | None):
    batch = make_batch(2)
    batch.ids = torch.arange(7).expand(3, 7)  # no token repeats
    weight = torch.tensor([1.0, 0.5, -1.0, 0.0, 0.0, 0.0, -2.0], dtype=torch.float64).expand(3, 7)
    objective = build([TOP(window=3)], model=INFO, backend=backend)
    (head,) = objective.parameters()
    losses = []
    for b in range(3):
        for t in range(6):
            logp = (head @ batch.hidden[b, t]).log_softmax(-1)
            w = scores(batch, 3, b, t).softmax(-1)
            losses.append(-sum(w[s] * weight[b, s] * logp[s] for s in range(t + 1, min(7, t + 4))))
    out = objective(batch.streams(token_weight=weight))
    assert_same(out.loss, torch.stack(losses).mean(), [*batch.leaves, *objective.parameters()])
    assert out.metrics.compute()["top/loss"] == pytest.approx(out.loss.item(), rel=1e-12)
    with torch.no_grad():
        batch.hidden[:, 2] = torch.nan  # its targets all weigh 0
    spoiled = objective(batch.streams(token_weight=weight))
    assert torch.equal(spoiled.loss, out.loss)
    assert all(g.isfinite().all() for g in gradients(spoiled.loss, [batch.hidden, head]))


def test_the_head_is_its_own_and_inherits_softcap_and_scale():
    info = ModelInfo(
        hidden_size=6,
        vocab_size=11,
        num_layers=5,
        softcap=2.0,
        logit_scale=0.7,
        dtype=torch.float64,
    )
    batch, objective = make_batch(), build("top(window=1)", model=info)
    (head,) = objective.parameters()
    z = 2.0 * torch.tanh(0.7 * (batch.hidden[:, :-1] @ head.T) / 2.0)
    expected = torch.nn.functional.cross_entropy(z.mT, batch.ids[:, 1:])
    assert_same(objective(batch.streams(head=None)).loss, expected, [*batch.leaves, head])


def test_accuracy_is_that_of_the_nearest_target():
    batch, objective = make_batch(1), build("top", model=INFO)
    (head,) = objective.parameters()
    right = (batch.hidden[:, :-1] @ head.T).argmax(-1) == batch.ids[:, 1:]
    metrics = objective(batch.streams()).metrics.compute()
    assert right.any() and metrics["top/accuracy"] == pytest.approx(right.double().mean().item())


def test_a_negative_label_is_an_error():
    batch = make_batch()
    with pytest.raises(IndexError, match="labels"):
        build("top", model=INFO)(batch.streams(labels=batch.ids.clone().fill_(-1)))


def test_the_seed_alone_decides_the_head_and_it_builds_on_the_meta_device():
    state = torch.get_rng_state()
    (weight,) = build("top", model=INFO, seed=3).parameters()
    assert torch.equal(torch.get_rng_state(), state)
    with torch.device("meta"):
        objective = build("ntp + top", model=INFO, seed=3)
    assert all(p.is_meta for p in objective.parameters())
    objective.to_empty(device="cpu").reset_parameters()
    (again,) = objective.parameters()
    (other,) = build("top", model=INFO, seed=4).parameters()
    assert torch.equal(weight, again) and not torch.equal(weight, other)
    large = ModelInfo(hidden_size=64, vocab_size=512, num_layers=2, dtype=torch.bfloat16)
    (values,) = build("top", model=large).parameters()
    assert values.dtype == torch.bfloat16 and values.float().std().item() == pytest.approx(
        0.02, rel=0.02
    )


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("window=0", "window is 0, expected an integer in [1, 1048576]"),
        (
            "window=70000, compat=fp16_scores",
            'window is 70000, expected at most 65504 with "fp16_scores"',
        ),
        ("compat=fp16", 'compat is "fp16", expected one of "none", "fp16_scores"'),
    ],
)
def test_wrong_options_are_refused(options: str, problem: str):
    with pytest.raises(SpecError) as caught:
        parse(f"top({options})")
    assert problem in caught.value.problems[0]
