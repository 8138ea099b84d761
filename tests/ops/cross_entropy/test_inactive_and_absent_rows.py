"""linear_cross_entropy: ignored rows, rows of weight zero and rows of NaN."""

from functools import partial

import pytest
import torch

import nitp_ops
from tests.ops.cross_entropy.test_linear_cross_entropy import make
from tests.support.budget import close, outputs


def test_no_labelled_row_gives_zero_loss_and_zero_gradients():
    hidden, weight, _ = make()
    for rows in (0, 12):
        for reduction in ("mean", "sum", "none"):
            out = outputs(
                lambda h, w, n=rows, r=reduction: nitp_ops.linear_cross_entropy(
                    h[:n], w, torch.full((n,), -100), reduction=r
                ),
                [hidden, weight],
            )
            assert all(x.abs().sum() == 0 for x in out)


def test_an_ignored_nan_row_reaches_nothing_at_all():
    hidden, weight, labels = make()
    labels[4] = -100
    clean = outputs(lambda h, w: nitp_ops.linear_cross_entropy(h, w, labels), [hidden, weight])
    spoiled = hidden.detach().clone()
    spoiled[4] = float("nan")
    dirty = outputs(
        lambda h, w: nitp_ops.linear_cross_entropy(h, w, labels), [spoiled.requires_grad_(), weight]
    )
    for a, b in zip(dirty, clean, strict=True):
        assert torch.equal(a, b)


def test_a_nan_row_spoils_its_own_loss_only():
    hidden, weight, labels = make()
    spoiled = hidden.detach().clone()
    spoiled[4] = float("nan")
    loss, stats = nitp_ops.linear_cross_entropy(
        spoiled, weight, labels, reduction="none", return_stats=True
    )
    clean = nitp_ops.linear_cross_entropy(hidden, weight, labels, reduction="none")
    keep = torch.arange(12) != 4
    assert loss[4].isnan() and stats.log_sum_exp[4].isnan()
    assert torch.equal(loss[keep], clean[keep])


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_row_of_weight_zero_counts_but_adds_nothing_even_if_it_is_nan(backend):
    hidden, weight, labels = make()
    token_weight = torch.ones(12, dtype=torch.float64)
    token_weight[4] = 0
    spoiled = hidden.detach().clone()
    spoiled[4] = float("nan")
    loss = partial(
        nitp_ops.linear_cross_entropy, labels=labels, token_weight=token_weight, backend=backend
    )
    clean = outputs(loss, [hidden, weight])
    dirty = outputs(loss, [spoiled.requires_grad_(), weight])
    for a, b in zip(dirty, clean, strict=True):
        assert torch.equal(a, b)
    keep = torch.arange(12) != 4
    without = nitp_ops.linear_cross_entropy(hidden[keep], weight, labels[keep])
    close(clean[0] * 12, without * 11)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_an_ignored_row_is_zero_under_any_token_weight(backend):
    hidden, weight, labels = make()
    labels[3] = -100
    token_weight = torch.ones(12, dtype=torch.float64)
    token_weight[3] = float("nan")
    rows = nitp_ops.linear_cross_entropy(
        hidden, weight, labels, token_weight=token_weight, reduction="none", backend=backend
    )
    assert rows[3] == 0 and rows.isfinite().all()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_masked_vocabulary_entry_leaves_the_loss_finite(backend):
    hidden, weight, _ = make()
    bias = torch.zeros(31, dtype=torch.float64)
    bias[30] = -float("inf")
    loss = nitp_ops.linear_cross_entropy(
        hidden, weight, torch.arange(12), bias=bias, backend=backend
    )
    without = nitp_ops.linear_cross_entropy(hidden, weight[:30], torch.arange(12))
    close(loss, without)
