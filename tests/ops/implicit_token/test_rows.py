"""implicit_token_loss: invalid rows, rows of NaN, normalizers and stats."""

import torch

import nitp_ops
from nitp_ops import reference
from tests.ops.implicit_token.test_implicit_token_loss import call, make
from tests.support.budget import close, outputs


def test_an_invalid_nan_row_reaches_nothing_at_all():
    hidden, target, *weights = make()
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0, 2] = False
    spoiled, spoiled_target = hidden.detach().clone(), target.clone()
    spoiled[0, 2] = float("nan")
    spoiled_target[0, 0] = float("nan")  # no pair ends at t = 0
    options = {"valid": valid}
    clean = outputs(call(nitp_ops.implicit_token_loss, options), [hidden, target, *weights])
    dirty = outputs(
        call(nitp_ops.implicit_token_loss, options),
        [spoiled.requires_grad_(), spoiled_target, *weights],
    )
    for a, b in zip(dirty, clean, strict=True):
        assert torch.equal(a, b)


def test_a_nan_row_spoils_its_own_loss_only_and_stays_out_under_a_zero_upstream():
    hidden, target, *weights = make()
    spoiled = hidden.detach().clone()
    spoiled[1, 3] = float("nan")
    spoiled.requires_grad_()
    rows = nitp_ops.implicit_token_loss(spoiled, target, *weights, reduction="none")
    clean = nitp_ops.implicit_token_loss(hidden, target, *weights, reduction="none")
    assert rows[1, 3].isnan() and rows.isnan().sum() == 1
    keep = ~rows.isnan()
    assert torch.equal(rows[keep], clean[keep])
    gradients = torch.autograd.grad(rows, [spoiled, *weights], grad_outputs=keep.double())
    assert not any(g.isnan().any() for g in gradients)


def test_a_normalizer_of_any_dtype_divides_the_sum():
    inputs = make(dtype=torch.float32)
    total = nitp_ops.implicit_token_loss(*inputs, reduction="sum")
    for normalizer in (
        7,
        7.0,
        torch.tensor(7),
        torch.tensor(7.0),
        torch.tensor(7.0, dtype=torch.float64),
    ):
        loss = nitp_ops.implicit_token_loss(*inputs, normalizer=normalizer)
        assert loss.dtype == torch.float32
        close(loss, total / 7, 1e-6)


def test_no_valid_pair_gives_zero_loss_and_zero_gradients():
    inputs = make()
    for reduction in ("mean", "sum", "none"):
        options = {"valid": torch.zeros(2, 6, dtype=torch.bool), "reduction": reduction}
        assert all(
            x.abs().sum() == 0 for x in outputs(call(nitp_ops.implicit_token_loss, options), inputs)
        )


def test_retained_graphs_agree():
    hidden, target, *weights = make()
    for reduction in ("mean", "none"):
        loss = nitp_ops.implicit_token_loss(hidden, target, *weights, reduction=reduction).sum()
        first = torch.autograd.grad(loss, [hidden, *weights], retain_graph=True)
        second = torch.autograd.grad(3 * loss, [hidden, *weights], retain_graph=True)
        for a, b in zip(first, second, strict=True):
            close(3 * a, b)


def test_stats_are_zero_where_invalid_and_right_elsewhere():
    hidden, target, *weights = make()
    valid = torch.rand(2, 6) < 0.6
    loss, stats = nitp_ops.implicit_token_loss(
        hidden, target, *weights, valid=valid, return_stats=True
    )
    expected = nitp_ops.implicit_token_loss(
        hidden, target, *weights, valid=valid, return_stats=True, backend="reference"
    )[1]
    for ours, theirs in zip(stats, expected, strict=True):
        close(ours, theirs)
    keep = reference.pairs(hidden, valid, 1)
    close(stats.loss.sum() / keep.sum(), loss)
    assert all((field[~keep] == 0).all() and not field.requires_grad for field in stats)
