"""mtp_shared: several tokens from one row of logits, equal to separate cross-entropies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nitp_ops.engine.plan import head_passes
from nitp_ops.objectives import NTP, ModelInfo, MTPShared, SpecError, Streams, build, parse
from tests.support.objectives_cases import (
    INFO,
    Batch,
    assert_same,
    gradients,
    make_batch,
    ntp_sum,
    pairs,
)


def token_loss(
    batch: Batch, b: int, t: int, k: int, smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    z = batch.head(batch.hidden[b, t])
    lse = z.logsumexp(-1)
    return (
        (1 - smoothing) * (lse - z[batch.ids[b, t + k]])
        + smoothing * (lse - z.mean())
        + z_loss * lse.square()
    )


@pytest.fixture
def term_counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many terms each pass over a head was given."""
    calls: list[int] = []
    real = head_passes.grouped_linear_cross_entropy
    monkeypatch.setattr(
        head_passes,
        "grouped_linear_cross_entropy",
        lambda given, *a, **k: calls.append(len(given)) or real(given, *a, **k),
    )
    return calls


@settings(max_examples=25)
@given(
    offsets=st.lists(st.integers(1, 8), min_size=1, max_size=4, unique=True),
    seed=st.integers(0, 99),
    smoothing=st.sampled_from([0.0, 0.2, 1.0]),
    z_loss=st.sampled_from([0.0, 0.01]),
    beside=st.sampled_from(["", "ntp + ", "ntp(label_smoothing=0.2) + "]),
    backend=st.sampled_from([None, "reference"]),
)
def test_it_equals_the_sum_of_separate_cross_entropies(
    offsets, seed, smoothing, z_loss, beside, backend
):
    batch = make_batch(seed)
    draw = torch.Generator().manual_seed(seed)
    batch.documents = torch.randint(-1, 2, (3, 7), generator=draw).sort(dim=1).values
    ok = batch.extra["target_mask"] = torch.rand(3, 7, generator=draw) < 0.8
    weights = [0.5 + k for k in range(len(offsets))]
    options = f"offsets={offsets}, weights={weights}, label_smoothing={smoothing}, z_loss={z_loss}"
    out = build(f"{beside}0.7*mtp_shared({options})", model=INFO, backend=backend)(batch.streams())
    expected = batch.hidden.sum() * 0
    if beside:
        expected = (
            expected + build(beside.rstrip("+ "), model=INFO, backend=backend)(batch.streams()).loss
        )
    metrics = out.metrics.compute()
    for k, w in zip(offsets, weights, strict=True):
        losses = [token_loss(batch, b, t, k, smoothing, z_loss) for b, t in pairs(batch, k, ok)]
        mean = torch.stack(losses).mean() if losses else torch.zeros(())
        expected = expected + 0.7 * w * mean
        assert metrics[f"mtp_shared/{k}/count"] == len(losses)
        assert metrics[f"mtp_shared/{k}/loss"] == pytest.approx(mean.item(), rel=1e-10)
        assert metrics[f"loss/mtp_shared/{k}"] == pytest.approx(0.7 * w * mean.item(), rel=1e-10)
    assert_same(out.loss, expected, batch.leaves, 1e-11)
    assert metrics["loss"] == pytest.approx(out.loss.item(), rel=1e-10)


def test_the_gradient_on_a_row_of_logits_is_the_mass_of_its_targets_times_softmax_minus_the_targets():
    """Hidden states are the logits: the head is the identity. Token 3 stands twice ahead of t = 0
    and adds."""
    ids = torch.tensor([[0, 1, 3, 3, 2, 2], [5, 5, 5, 4, 1, 0]])
    z = torch.randn(2, 6, 7, dtype=torch.float64, requires_grad=True)
    info = ModelInfo(hidden_size=7, vocab_size=7, num_layers=1, dtype=torch.float64)
    head = torch.eye(7, dtype=torch.float64, requires_grad=True)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, -1]])
    streams = Streams(token_ids=ids, last_hidden=z, head=head, document_ids=documents)
    build("mtp_shared(offsets=[1, 2, 3], weights=[1, 2, 0.5])", model=info)(streams).loss.backward()
    expected = torch.zeros_like(z)
    for k, w in ((1, 1.0), (2, 2.0), (3, 0.5)):
        rows = [
            (b, t)
            for b in range(2)
            for t in range(6 - k)
            if documents[b, t] == documents[b, t + k] >= 0
        ]
        for b, t in rows:
            target = F.one_hot(ids[b, t + k], 7)
            expected[b, t] += w / len(rows) * (z[b, t].detach().softmax(-1) - target)
    torch.testing.assert_close(z.grad, expected, rtol=1e-13, atol=1e-15)


def test_all_its_offsets_and_an_equal_ntp_are_one_set_of_rows(term_counts: list[int]):
    streams = make_batch().streams()
    for spec in (
        "mtp_shared(offsets=[2, 3, 4])",
        "ntp + mtp_shared",
        "ntp + nitp + mtp_shared + b: 2*mtp_shared",
    ):
        build(spec, model=INFO)(streams)
    assert term_counts == [1, 1, 1]


@pytest.mark.parametrize(
    "spec",
    [
        "ntp(z_loss=0.1) + mtp_shared",
        "ntp + mtp_shared(label_smoothing=0.1)",
        "ntp + 0*mtp_shared",
        "ntp + schedule(to=1, warmup=4)*mtp_shared",
    ],
)
def test_rows_that_differ_or_may_be_inactive_stay_apart_from_ntp(spec: str, term_counts: list[int]):
    build(spec, model=INFO)(make_batch().streams(), step=1)
    assert term_counts == [2]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    "options", ["", "(label_smoothing=0.1)", "(z_loss=0.1)", "(label_smoothing=0.3, z_loss=0.1)"]
)
def test_under_a_weight_of_zero_every_offset_is_measured_all_the_same(
    options: str, backend: str | None
):
    streams = make_batch().streams()
    inactive = build(f"0*mtp_shared{options}", model=INFO, backend=backend)(
        streams
    ).metrics.compute()
    active = build(f"mtp_shared{options}", model=INFO, backend=backend)(streams).metrics.compute()
    for k in (2, 3):
        for name in ("loss", "count", "accuracy"):
            assert inactive[f"mtp_shared/{k}/{name}"] == pytest.approx(
                active[f"mtp_shared/{k}/{name}"], rel=1e-12
            )
    assert inactive["loss"] == 0


def test_accuracy_is_that_of_each_offset():
    batch = make_batch(3)
    metrics = build("ntp + mtp_shared", model=INFO)(batch.streams()).metrics.compute()
    for k, name in ((1, "ntp"), (2, "mtp_shared/2"), (3, "mtp_shared/3")):
        right = batch.head(batch.hidden[:, :-k]).argmax(-1) == batch.ids[:, k:]
        assert metrics[f"{name}/accuracy"] == pytest.approx(right.double().mean().item())


@pytest.mark.parametrize(
    "spec", ["mtp_shared", "ntp + mtp_shared(z_loss=0.1, label_smoothing=0.1)"]
)
def test_token_weights_of_either_sign_multiply_each_target(spec: str):
    """Two targets of one row weighted 1 and -1 must not cancel to an inactive row."""
    batch = make_batch(length=9)
    batch.documents = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2]] * 3)
    weight = torch.tensor(
        [1.0, 1.0, -1.0, 1.0, -1.0, 1.0, 0.0, 1.0, -1.0], dtype=torch.float64
    ).expand(3, 9)
    term = parse(spec).terms[-1]
    assert isinstance(term, MTPShared)
    expected = batch.hidden.sum() * 0
    for k in (1, 2, 3) if "ntp" in spec else (2, 3):
        smoothing, z_loss = (0.0, 0.0) if k == 1 else (term.label_smoothing, term.z_loss)
        losses = [
            weight[b, t + k] * token_loss(batch, b, t, k, smoothing, z_loss)
            for b, t in pairs(batch, k)
        ]
        expected = expected + (torch.stack(losses).mean() if losses else 0)
    loss = build(spec, model=INFO)(batch.streams(token_weight=weight)).loss
    assert_same(loss, expected, batch.leaves)


def test_a_negative_label_beside_other_targets_is_an_error_and_not_absent():
    batch = make_batch()
    labels = batch.ids.clone()
    labels[1, 4] = -1
    with pytest.raises(IndexError, match="labels"):
        build("ntp + mtp_shared", model=INFO)(batch.streams(labels=labels))
    out = build("ntp + mtp_shared", model=INFO)(batch.streams(labels=labels, ignore_index=-1))
    assert out.metrics.compute()["ntp/count"] == 17


def test_the_offset_one_is_ntp():
    batch = make_batch()
    loss = build("ntp + 0.5*mtp_shared(offsets=[1])", model=INFO)(batch.streams()).loss
    assert_same(loss, 1.5 * ntp_sum(batch, pairs(batch, 1)) / 18, batch.leaves)
    alone = build("mtp_shared(offsets=[1])", model=INFO)(batch.streams())
    ntp = build([NTP()], model=INFO)(batch.streams())
    for mine, other in zip(
        gradients(alone.loss, batch.leaves), gradients(ntp.loss, batch.leaves), strict=True
    ):
        assert torch.equal(mine, other)


def test_pre_shifted_labels_offer_every_offset_one_target_more():
    batch = make_batch()
    counts = build("mtp_shared", model=INFO).count(batch.streams(shift_labels=batch.ids))
    assert {name: n.item() for name, n in counts.items()} == {
        "mtp_shared/2": 18,
        "mtp_shared/3": 15,
    }


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("offsets=[]", "offsets is [], expected distinct integers in [1, 1048576]"),
        ("offsets=[0, 1]", "offsets is [0, 1], expected distinct"),
        ("offsets=[2, 2]", "offsets is [2, 2], expected distinct"),
        ("offsets=[2, 0.5]", "offsets is (2, 0.5), expected a list of integers"),
        ("weights=[1]", "weights is [1], expected 2 numbers, one for each offset"),
        ("weights=[1, 0]", "weights is 0, expected a number > 0"),
        ("label_smoothing=2", "label_smoothing is 2.0, expected a number in [0, 1]"),
    ],
)
def test_wrong_options_are_refused(options: str, problem: str):
    with pytest.raises(SpecError) as caught:
        parse(f"mtp_shared({options})")
    assert (
        len(caught.value.problems) == 1
        and problem.replace("(2, 0.5)", "[2, 0.5]") in caught.value.problems[0]
    )


def test_explain_names_its_offsets_and_adds_no_parameter():
    text = build("ntp + mtp_shared(offsets=[2, 5])", model=INFO).explain()
    assert "h_t against tokens t+2, t+5" in text and "0 parameters added" in text
