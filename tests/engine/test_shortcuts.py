"""What a call of an objective leaves out of most batches is still there for the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nitp_ops.engine.streams.targets import token_targets, valid_pairs
from nitp_ops.objectives import (
    NTP,
    CosineRegularizer,
    Counts,
    ModelInfo,
    Ramp,
    Streams,
    Window,
    build,
)

INFO = ModelInfo(hidden_size=8, vocab_size=16, num_layers=4)
IDS = torch.arange(10).view(2, 5)


def streams(**fields: object) -> Streams:
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    given = {"token_ids": IDS, "last_hidden": hidden, "hidden_states": {1: torch.randn(2, 5, 8)}}
    return Streams(**(given | {"head": nn.Linear(8, 16, bias=False)} | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(("wrong", "ignore_index"), [(16, -100), (-5, -100), (-100, -1), (99, 3)])
def test_a_target_outside_the_vocabulary_is_named_where_it_stands(wrong: int, ignore_index: int):
    labels = IDS.clone()
    labels[1, 2], labels[0, 3] = wrong, ignore_index
    message = rf"^objective: labels\[1, 2\] is {wrong}, expected a value in \[0, 16\) or ignore_index={ignore_index}$"
    with pytest.raises(IndexError, match=message):
        build("ntp", model=INFO)(streams(labels=labels, ignore_index=ignore_index))


def test_the_first_token_and_absent_ones_may_lie_outside():
    labels = IDS.clone()
    labels[:, 0], labels[0, 2], labels[1, 4] = 99, -100, -100
    assert build("ntp", model=INFO)(streams(labels=labels)).metrics.compute()["ntp/count"] == 6


@pytest.mark.parametrize("weight", [1.0, Ramp(to=2.0)])
def test_a_batch_without_rows_has_a_loss_of_zero(weight: float | Ramp):
    objective = build([NTP(weight=weight), CosineRegularizer(weight=weight)], model=INFO)
    loss, metrics = objective(streams(document_ids=torch.full((2, 5), -1)), step=1)
    assert loss.item() == 0 and metrics.compute()["loss"] == 0


def test_infinite_counts_of_a_window_keep_a_nan_out():
    objective = build("cosine_regularizer", model=INFO)
    given = streams(last_hidden=torch.full((2, 5, 8), torch.nan))
    window = Window(
        counts=Counts({"cosine_regularizer": torch.tensor(torch.inf, dtype=torch.float64)})
    )
    assert objective(given).loss.isnan() and objective(given, window=window).loss.item() == 0


def test_a_label_of_minus_one_that_is_absent_is_not_right():
    labels = torch.full((2, 5), -1)
    labels[:, 1] = 3
    out = build("ntp", model=INFO)(streams(labels=labels, ignore_index=-1))
    assert out.metrics.compute()["ntp/count"] == 2 and out.metrics.compute()["ntp/accuracy"] <= 1


def test_nothing_formed_in_a_call_outlives_it():
    """Labels that are written into between two calls are read anew."""
    objective, labels = build("ntp", model=INFO), IDS.clone()
    given = streams(labels=labels)
    before = objective(given).loss
    labels[:, 1:] = 3
    assert given.formed is None and objective(given).loss != before
    assert objective.count(given)["ntp"] == 8
    labels[:, 1:] = -100
    assert objective.count(given)["ntp"] == 0


def test_inside_a_call_targets_are_formed_once():
    given = streams().for_a_call()
    kept: list[tuple[Tensor, Tensor]] = [
        (token_targets(given, 1), valid_pairs(given, 1)) for _ in range(2)
    ]
    assert all(first is second for first, second in zip(*kept, strict=True))
    assert (
        token_targets(given, 2) is not kept[0][0]
        and valid_pairs(given, 1, labelled=True) is not kept[0][1]
    )


def test_metrics_are_those_of_their_pass():
    """They are widened at the first read; what the pass summed may have changed by then."""
    total = torch.tensor(2.0)
    out = build("external", model=INFO)(Streams(token_ids=IDS, external={"external": (total, 4)}))
    total.add_(1)
    assert (
        out.metrics.compute()["external/loss"] == 0.5
        and out.metrics.sums["external"]["loss"].dtype == torch.float64
    )
