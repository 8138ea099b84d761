"""Class weights on ntp: PyTorch's row loss over the number of rows, alone and beside other terms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nitp_ops.objectives import build
from tests.support.objectives_cases import INFO, assert_same, make_batch, pairs

BACKENDS = pytest.mark.parametrize("backend", [None, "reference"])


def weights(dtype: torch.dtype = torch.float64) -> Tensor:
    return (
        torch.rand(INFO.vocab_size, generator=torch.Generator().manual_seed(5), dtype=dtype) + 0.1
    )


def expected(batch, positions, smoothing: float, z_loss: float) -> Tensor:
    logits = torch.stack([batch.head(batch.hidden[b, t]) for b, t in positions])
    labels = torch.stack([batch.ids[b, t + 1] for b, t in positions])
    loss = F.cross_entropy(logits, labels, weights(), label_smoothing=smoothing, reduction="sum")
    return (loss + z_loss * logits.logsumexp(-1).square().sum()) / len(positions)


@BACKENDS
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.3), (0.2, 0.3)])
def test_the_loss_is_pytorchs_over_the_number_of_rows(backend, smoothing, z_loss):
    batch = make_batch()
    batch.documents = torch.tensor([[0, 0, 0, 1, 1, -1, -1], [0] * 7, [-1] * 7])
    spec = f"ntp(class_weight=true, label_smoothing={smoothing}, z_loss={z_loss})"
    out = build(spec, model=INFO, backend=backend)(batch.streams(class_weight=weights()))
    assert out.metrics.compute()["ntp/count"] == len(pairs(batch, 1))
    assert_same(out.loss, expected(batch, pairs(batch, 1), smoothing, z_loss), batch.leaves)


@BACKENDS
def test_only_the_term_that_asks_is_weighted_and_they_share_one_pass(backend):
    batch = make_batch()
    streams, plain = batch.streams(class_weight=weights()), batch.streams()
    combined = build(
        "plain: ntp + ntp(class_weight=true) + mtp_shared", model=INFO, backend=backend
    )(streams)
    one, other = (
        build(spec, model=INFO, backend=backend) for spec in ("plain: ntp + mtp_shared", "ntp")
    )
    assert_same(
        combined.loss, one(plain).loss + expected(batch, pairs(batch, 1), 0, 0), batch.leaves
    )
    assert combined.metrics.compute()["plain/loss"] == pytest.approx(
        other(plain).metrics.compute()["ntp/loss"]
    )


def test_without_smoothing_and_z_loss_it_is_a_token_weight():
    batch = make_batch()
    one = build("ntp(class_weight=true)", model=INFO)(batch.streams(class_weight=weights())).loss
    other = build("ntp", model=INFO)(batch.streams(token_weight=weights()[batch.ids])).loss
    assert_same(one, other, batch.leaves)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            None,
            ValueError,
            r"^objective: streams lacks class_weight, expected class_weight, head, "
            r"last_hidden, tok",
        ),
        (torch.ones(4), ValueError, r"class_weight has shape \(4,\), expected \(11,\)"),
        (
            torch.ones(11, 1),
            ValueError,
            r"^Streams: class_weight has shape \(11, 1\), expected "
            r"\(V,\)$",
        ),
        (
            torch.ones(11, dtype=torch.int64),
            TypeError,
            r"^Streams: class_weight is torch.int64, "
            r"expected a floating",
        ),
        (torch.ones(11, requires_grad=True), ValueError, r"class_weight"),
    ],
)
def test_unfit_class_weights_are_refused_by_name(given, error, message):
    with pytest.raises(error, match=message):
        build("ntp(class_weight=true)", model=INFO)(make_batch().streams(class_weight=given))
