"""Token losses of large offsets, confident rows, infinities and NaN."""

import pytest
import torch
import torch.nn.functional as F

import nitp_ops
from nitp_ops import linear_cross_entropy, reference
from tests.ops.cross_entropy.test_token_semantics import BOTH, make
from tests.support.budget import close, outputs, widened


@pytest.mark.parametrize("e", [0.0, 0.1, 1.0])
def test_a_constant_offset_of_10000_cancels_before_anything_is_rounded_to_it(e):
    hidden, weight, labels = make(dtype=torch.float32)
    hidden = torch.cat([hidden.detach(), torch.full((12, 1), 100.0)], 1).requires_grad_()
    weight = torch.cat([weight.detach(), torch.full((31, 1), 100.0)], 1).requires_grad_()
    ours = outputs(
        lambda h, w: linear_cross_entropy(h, w, labels, label_smoothing=e), [hidden, weight]
    )
    inputs = widened([hidden, weight])
    exact = outputs(
        lambda h, w: reference.linear_cross_entropy(h, w, labels, label_smoothing=e), inputs
    )
    # the logits themselves round to 2^-10 at 10^4; nothing rounds further
    assert abs(ours[0].item() - exact[0].item()) < 2**-10
    for a, b in zip(ours[1:], exact[1:], strict=True):
        close(a[:, :6], b[:, :6], 2**-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_hot_confident_rows_give_zero_loss_and_a_gradient_of_zero(dtype):
    weight = (40 * torch.eye(16)).to(dtype).requires_grad_()
    hidden = (40 * torch.eye(16)).to(dtype).requires_grad_()
    right = outputs(lambda h, w: linear_cross_entropy(h, w, torch.arange(16)), [hidden, weight])
    assert all(bool((x == 0).all()) for x in right)
    wrong = linear_cross_entropy(hidden, weight, torch.arange(16).roll(1))
    assert wrong.item() == 1600.0


@BOTH
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_infinite_and_nan_rows_spoil_their_own_loss_only(backend, value):
    hidden, weight, labels = make()
    clean = linear_cross_entropy(hidden, weight, labels, reduction="none", backend=backend)
    spoiled = hidden.detach().clone()
    spoiled[4] = value
    loss = linear_cross_entropy(spoiled, weight, labels, reduction="none", backend=backend)
    keep = torch.arange(12) != 4
    assert not loss[4].isfinite() and torch.equal(loss[keep], clean[keep])


@BOTH
def test_a_label_on_a_masked_logit_costs_infinity_and_weight_zero_hides_it(backend):
    hidden, weight, labels = make()
    bias = torch.zeros(31, dtype=torch.float64)
    bias[int(labels[2])] = -float("inf")
    others = labels != labels[2]
    loss = linear_cross_entropy(
        hidden, weight, labels, bias=bias, reduction="none", backend=backend
    )
    assert loss[2] == float("inf") and loss[others].isfinite().all()
    weights = torch.ones(12, 1, dtype=torch.float64).where(others[:, None], 0)
    options = {"target_weight": weights, "bias": bias, "reduction": "none", "backend": backend}
    hidden_away = linear_cross_entropy(hidden, weight, labels[:, None], **options)
    assert hidden_away.isfinite().all() and hidden_away[2] == 0


def test_half_precision_round_trips_through_the_row_kernels():
    """Every float16 number is read and written exactly; between them numbers round to the nearest
    even one."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = every[every.isfinite()]
    ones = torch.full_like(finite, 30.0)  # silu(30) is 30 (1 - 1e-13)
    out = nitp_ops.swiglu(ones[None], (finite / 64)[None])[0]
    expected = (finite / 64).float() * F.silu(ones.double()).float()
    assert torch.equal(out, expected.half())
    beyond = nitp_ops.swiglu(
        torch.full((1, 2), 30.0).half(), torch.tensor([[6e4, float("nan")]]).half()
    )[0]
    assert beyond[0] == float("inf") and beyond[1].isnan()


def test_stats_are_those_of_the_plain_logits():
    hidden, weight, labels = make()
    labels[2] = -100
    loss, stats = nitp_ops.linear_cross_entropy(
        hidden, weight, labels, softcap=4.0, return_stats=True, z_loss=0.1
    )
    logits = 4 * torch.tanh(hidden @ weight.T / 4)
    keep = labels != -100
    close(stats.log_sum_exp[keep], logits.logsumexp(-1)[keep])
    close(stats.target_logit[keep], logits[keep].gather(1, labels[keep, None]).squeeze(1))
    assert torch.equal(stats.prediction[keep], logits.argmax(-1)[keep])
    assert stats.prediction[2] == -1 and stats.log_sum_exp[2].isnan() and stats.loss[2] == 0
    close(stats.loss.sum() / keep.sum(), loss)
    assert not any(field.requires_grad for field in stats)
    by_reference = nitp_ops.linear_cross_entropy(
        hidden, weight, labels, softcap=4.0, return_stats=True, z_loss=0.1, backend="reference"
    )[1]
    for ours, theirs in zip(stats, by_reference, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
