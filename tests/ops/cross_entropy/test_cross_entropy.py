"""cross_entropy: logits that exist already, the gradient beside them or in their place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import nitp_ops
from nitp_ops import reference
from tests.core.without_reading import NoReading, without_reading
from tests.ops.cross_entropy.test_linear_cross_entropy import problems
from tests.support.budget import close, near, outputs, widened, within_budget

BACKENDS = pytest.mark.parametrize("backend", ["native", "torch"])
EVERYTHING: dict[str, Any] = {
    "label_smoothing": 0.1,
    "z_loss": 0.02,
    "softcap": 2.0,
    "logit_scale": 0.7,
}


def make(rows=12, vocabulary=31, dtype=torch.float64):
    return torch.randn(rows, vocabulary, dtype=dtype, requires_grad=True), torch.randint(
        0, vocabulary, (rows,)
    )


def loss_of(book, labels, **options):
    return lambda logits, bias=None: book.cross_entropy(logits, labels, bias=bias, **options)


def in_place(labels, **options):
    """The op over a copy that it may overwrite."""
    return lambda logits, bias=None: nitp_ops.cross_entropy(
        logits * 1, labels, bias=bias, inplace_gradient=True, **options
    )


@given(problems(), st.sampled_from(["native", "torch"]))
def test_it_equals_the_reference(problem, backend):
    (hidden, weight, *bias), labels, options, upstream, _ = problem
    inputs = [(hidden @ weight.T).detach().requires_grad_(), *bias]
    exact = outputs(loss_of(reference, labels, **options), widened(inputs), upstream)
    for ours in (
        loss_of(nitp_ops, labels, backend=backend, **options),
        in_place(labels, backend=backend, **options),
    ):
        results = outputs(ours, inputs, upstream)
        near(results, exact, ["loss", "d logits", "d bias"])
        assert [x.dtype for x in results[1:]] == [x.dtype for x in inputs]


def test_the_reference_is_pytorchs_cross_entropy():
    logits, labels = make()
    labels[3] = -100
    for reduction in ("mean", "sum", "none"):
        for smoothing in (0.0, 0.2):
            theirs = F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=smoothing)
            close(
                reference.cross_entropy(
                    logits, labels, reduction=reduction, label_smoothing=smoothing
                ),
                theirs,
            )


@given(problems())
def test_it_equals_linear_cross_entropy_of_the_same_logits(problem):
    inputs, labels, options, upstream, _ = problem
    hidden, weight, *bias = widened(inputs)
    fused = outputs(
        lambda h, w, b=None: nitp_ops.linear_cross_entropy(h, w, labels, bias=b, **options),
        [hidden, weight, *bias],
        upstream,
    )
    apart = outputs(
        lambda h, w, b=None: nitp_ops.cross_entropy(h @ w.T, labels, bias=b, **options),
        [hidden, weight, *bias],
        upstream,
    )
    near(apart, fused, ["loss", "d hidden", "d unembedding", "d bias"])


@pytest.mark.parametrize("overwrite", [False, True])
def test_on_a_gpu_the_host_reads_no_value(overwrite):
    logits, labels = make()
    labels[::3] = -100
    exact = outputs(loss_of(reference, labels, **EVERYTHING), [logits])
    with without_reading(), NoReading():
        loss = nitp_ops.cross_entropy(logits * 1, labels, inplace_gradient=overwrite, **EVERYTHING)
        gradient = torch.autograd.grad(loss, logits)[0]
    near([loss.detach(), gradient], exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@BACKENDS
def test_it_keeps_the_budget(dtype, backend):
    logits = (3 * torch.randn(130, 999)).to(dtype).requires_grad_()
    labels = torch.randint(0, 999, (130,))
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0}):
        eager = outputs(loss_of(reference, labels, **options), [logits])
        exact = outputs(loss_of(reference, labels, **options), widened([logits]))
        for ours in (
            loss_of(nitp_ops, labels, backend=backend, **options),
            in_place(labels, **options),
        ):
            within_budget(outputs(ours, [logits]), eager, exact)


@BACKENDS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_holds_in_float64(reduction, backend):
    logits, labels = make(5, 7)
    labels[2] = -100
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    options = {**EVERYTHING, "reduction": reduction, "backend": backend}
    assert torch.autograd.gradcheck(loss_of(nitp_ops, labels, **options), (logits, bias))


def test_any_leading_shape_and_any_strides_give_the_same_numbers():
    logits, labels = make(24)
    expected = outputs(loss_of(nitp_ops, labels), [logits])
    shaped = outputs(
        lambda x: nitp_ops.cross_entropy(x.view(2, 3, 4, 31), labels.view(2, 3, 4)), [logits]
    )
    wide = torch.randn(24, 62, dtype=torch.float64)
    every_second, rows = wide[:, ::2], torch.randn(24, 40, dtype=torch.float64)[:, :31]
    for strided in (every_second, rows, logits.detach().t().contiguous().t()):
        strided.copy_(logits.detach())
        again = outputs(loss_of(nitp_ops, labels), [strided.detach().requires_grad_()])
        for a, b in zip(again, expected, strict=True):
            assert torch.equal(a, b)
    for a, b in zip(shaped, expected, strict=True):
        assert torch.equal(a, b)
    crossed = logits.detach().view(4, 6, 31).transpose(0, 1).requires_grad_()
    of_crossed = outputs(lambda x: nitp_ops.cross_entropy(x, labels.view(4, 6).t()), [crossed])
    close(of_crossed[0], expected[0])
    close(of_crossed[1].transpose(0, 1).reshape(24, 31), expected[1])


def test_chunks_of_rows_change_nothing(monkeypatch):
    logits, labels = make(40)
    bias = torch.randn(31, dtype=torch.float64, requires_grad=True)
    whole = outputs(loss_of(nitp_ops, labels, reduction="sum"), [logits, bias])
    monkeypatch.setattr(nitp_ops.ops.cross_entropy.logits.autograd, "LEAST_BYTES", 7 * 31 * 8)
    for ours in (loss_of(nitp_ops, labels, reduction="sum"), in_place(labels, reduction="sum")):
        for a, b in zip(outputs(ours, [logits, bias]), whole, strict=True):
            close(a, b)


def test_retained_graphs_and_any_upstream_gradient_agree():
    logits, labels = make()
    for reduction in ("mean", "none"):
        loss = nitp_ops.cross_entropy(logits, labels, reduction=reduction).sum()
        first, second, third = (
            torch.autograd.grad(loss * factor, logits, retain_graph=True)[0] for factor in (1, 3, 1)
        )
        close(second, 3 * first)
        assert torch.equal(first, third)


def test_stats_are_those_of_the_reference():
    logits, labels = make()
    labels[5] = -100
    for return_stats in (True, "entropy"):
        loss, ours = nitp_ops.cross_entropy(logits, labels, return_stats=return_stats, **EVERYTHING)
        again, theirs = nitp_ops.cross_entropy(
            logits, labels, return_stats=return_stats, backend="reference", **EVERYTHING
        )
        close(loss.detach(), again.detach())
        assert type(ours) is type(theirs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b.to(a.dtype), equal_nan=True, rtol=1e-12, atol=1e-12)


@BACKENDS
def test_ignored_and_weightless_rows_that_are_nan_reach_nothing(backend):
    logits, labels = make()
    labels[4], weight = -100, torch.ones(12, dtype=torch.float64)
    weight[7] = 0
    spoiled = logits.detach().clone()
    spoiled[4] = spoiled[7] = float("nan")
    ours = loss_of(nitp_ops, labels, token_weight=weight, backend=backend)
    for a, b in zip(
        outputs(ours, [spoiled.requires_grad_()]), outputs(ours, [logits]), strict=True
    ):
        assert torch.equal(a, b)


@BACKENDS
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_weight_of_zero_hides_a_loss_that_is_no_number(backend, reduction):
    logits, labels = make()
    with torch.no_grad():
        logits[3], logits[5, labels[5]] = torch.nan, -torch.inf
    weight = torch.ones(12, dtype=torch.float64)
    weight[[3, 5]] = 0
    loss = nitp_ops.cross_entropy(
        logits, labels, token_weight=weight, reduction=reduction, backend=backend
    )
    assert loss.isfinite().all() and (
        reduction == "sum" or (loss == 0).tolist() == (weight == 0).tolist()
    )


def test_an_upstream_of_zero_gives_zeros_whatever_it_meets():
    logits, labels = make()
    spoiled = logits.detach().clone()
    weight, upstream = torch.ones(2, 12, dtype=torch.float64)
    spoiled[4] = weight[5] = float("inf")
    upstream[4:6] = 0
    rows = nitp_ops.cross_entropy(
        spoiled.requires_grad_(), labels, token_weight=weight, reduction="none"
    )
    (gradient,) = torch.autograd.grad(rows, spoiled, upstream)
    assert (gradient[4:6] == 0).all() and gradient.isfinite().all()


def test_no_labelled_row_gives_zero_loss_and_zero_gradients():
    for rows in (0, 12):
        logits, _ = make(rows)
        for reduction in ("mean", "sum", "none"):
            found = outputs(
                loss_of(nitp_ops, torch.full((rows,), -100), reduction=reduction), [logits]
            )
            assert all(x.abs().sum() == 0 for x in found)


def test_either_gradient_comes_alone():
    logits, labels = make()
    bias = torch.randn(31, dtype=torch.float64, requires_grad=True)
    _, d_logits, d_bias = outputs(loss_of(nitp_ops, labels), [logits, bias])
    close(outputs(loss_of(nitp_ops, labels), [logits, bias.detach()])[1], d_logits)
    close(outputs(loss_of(nitp_ops, labels), [logits.detach(), bias])[1], d_bias)
    assert not nitp_ops.cross_entropy(logits.detach(), labels).requires_grad
