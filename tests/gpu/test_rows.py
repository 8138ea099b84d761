"""On a GPU rows that do not count reach nothing, however many the host allows; wrong labels poison
their row."""

from functools import partial

import pytest
import torch

import nitp_ops
from nitp_ops import reference
from tests.gpu.gpu_cases import BACKENDS, DEVICE, ON_GPU, labels_and_target, normal, served, tensors
from tests.support.budget import close, near, outputs

pytestmark = ON_GPU

NAN = float("nan")
BOUNDS = pytest.mark.parametrize("bound", [None, "equal", "above"])


def max_rows(bound, keep):
    """No bound, or one that the rows that count reach or stay under."""
    return None if bound is None else int(keep.sum()) + (5 if bound == "above" else 0)


def token_problem(dtype=torch.float64):
    hidden, weight, *_ = tensors(dtype)
    return [hidden, weight], labels_and_target()[0]


def latent_problem():
    hidden, _, *weights = tensors(torch.float64)
    labels, target = labels_and_target()
    return [hidden, *weights], target.double(), labels >= 0


@BACKENDS
@BOUNDS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_bound_on_the_rows_changes_nothing_of_cross_entropy(backend, bound, reduction):
    inputs, labels = token_problem()
    most = max_rows(bound, labels >= 0)
    options = {
        "reduction": reduction,
        "max_rows": most,
        "chunk_bytes": 20 * 301 * 8,
        "backend": served(backend),
    }
    ours = outputs(
        lambda h, w: nitp_ops.linear_cross_entropy(h, w, labels, **options), inputs, 0.37
    )
    exact = outputs(
        lambda h, w: reference.linear_cross_entropy(h, w, labels, reduction=reduction), inputs, 0.37
    )
    for a, b in zip(ours, exact, strict=True):
        close(a, b)


@BACKENDS
@BOUNDS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_bound_on_the_rows_changes_nothing_of_implicit_token_loss(backend, bound, reduction):
    inputs, target, valid = latent_problem()
    most = max_rows(bound, reference.pairs(inputs[0], valid, 1))
    same = {"reduction": reduction, "valid": valid}
    fused = {**same, "max_rows": most, "chunk_bytes": 9000, "backend": served(backend)}
    ours = outputs(lambda h, *w: nitp_ops.implicit_token_loss(h, target, *w, **fused), inputs, 0.37)
    exact = outputs(
        lambda h, *w: reference.implicit_token_loss(h, target, *w, **same), inputs, 0.37
    )
    for a, b in zip(ours, exact, strict=True):
        close(a, b)


@BACKENDS
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_more_rows_than_the_bound_make_the_loss_nan(backend, reduction):
    (hidden, weight), labels = token_problem()
    options = {"reduction": reduction, "backend": served(backend)}
    most = int((labels >= 0).sum()) - 1
    assert nitp_ops.linear_cross_entropy(hidden, weight, labels, max_rows=most, **options).isnan()
    inputs, target, valid = latent_problem()
    most = int(reference.pairs(inputs[0], valid, 1).sum()) - 1
    fused = {**options, "valid": valid, "max_rows": most}
    assert nitp_ops.implicit_token_loss(inputs[0], target, *inputs[1:], **fused).isnan()


@BACKENDS
def test_each_job_of_a_shared_pass_has_its_own_bound(backend):
    (hidden, weight), labels = token_problem()
    other = labels.flip(0)

    def loss(bounds):
        jobs = [
            nitp_ops.CrossEntropyTerm(hidden, each, max_rows=most)
            for each, most in zip((labels, other), bounds, strict=True)
        ]
        return nitp_ops.grouped_linear_cross_entropy(jobs, weight, backend=served(backend))[0]

    count = int((labels >= 0).sum())
    close(loss((count, count + 3)), loss((None, None)))
    assert loss((count, count - 1)).isnan()


@BACKENDS
@BOUNDS
def test_an_ignored_nan_row_reaches_nothing_at_all(backend, bound):
    (hidden, weight), labels = token_problem(torch.float32)
    options = {
        "max_rows": max_rows(bound, labels >= 0),
        "chunk_bytes": 20 * 301 * 4,
        "backend": served(backend),
    }
    clean = outputs(
        lambda h, w: nitp_ops.linear_cross_entropy(h, w, labels, **options), [hidden, weight]
    )
    spoiled = hidden.detach().masked_fill((labels < 0).unsqueeze(-1), NAN).requires_grad_()
    dirty = outputs(
        lambda h, w: nitp_ops.linear_cross_entropy(h, w, labels, **options), [spoiled, weight]
    )
    for a, b in zip(dirty, clean, strict=True):
        assert torch.equal(a, b)


@BACKENDS
@BOUNDS
def test_an_invalid_nan_pair_reaches_nothing_at_all(backend, bound):
    (hidden, *weights), target, valid = latent_problem()
    keep = reference.pairs(hidden, valid, 1)
    options = {
        "valid": valid,
        "max_rows": max_rows(bound, keep),
        "chunk_bytes": 9000,
        "backend": served(backend),
    }
    clean = outputs(
        lambda h, *w: nitp_ops.implicit_token_loss(h, target, *w, **options), [hidden, *weights]
    )
    spoiled = hidden.detach().masked_fill(~keep.unsqueeze(-1), NAN).requires_grad_()
    unread = ~keep.roll(1, 1)
    unread[:, 0] = True
    spoiled_target = target.masked_fill(unread.unsqueeze(-1), NAN)
    dirty = outputs(
        lambda h, *w: nitp_ops.implicit_token_loss(h, spoiled_target, *w, **options),
        [spoiled, *weights],
    )
    for a, b in zip(dirty, clean, strict=True):
        assert torch.equal(a, b)


@BACKENDS
def test_a_nan_row_spoils_its_own_loss_only(backend):
    (hidden, weight), labels = token_problem()
    labels = labels.clamp(min=0)
    loss = partial(
        nitp_ops.linear_cross_entropy, labels=labels, reduction="none", backend=served(backend)
    )
    spoiled = hidden.detach().clone()
    spoiled[1, 4] = NAN
    dirty, clean = loss(spoiled, weight), loss(hidden, weight)
    keep = torch.ones_like(labels, dtype=torch.bool)
    keep[1, 4] = False
    assert dirty[1, 4].isnan() and torch.equal(dirty[keep], clean[keep])


@BACKENDS
def test_a_row_of_weight_zero_adds_nothing_even_if_it_is_nan(backend):
    (hidden, weight), labels = token_problem()
    labels[1, 4] = 3
    scale = torch.ones(labels.shape, dtype=torch.float64, device=DEVICE)
    scale[1, 4] = 0
    loss = partial(
        nitp_ops.linear_cross_entropy, labels=labels, token_weight=scale, backend=served(backend)
    )
    spoiled = hidden.detach().clone()
    spoiled[1, 4] = NAN
    for a, b in zip(
        outputs(loss, [spoiled.requires_grad_(), weight]),
        outputs(loss, [hidden, weight]),
        strict=True,
    ):
        assert torch.equal(a, b)


@BACKENDS
@pytest.mark.parametrize("wrong", [301, 302, 10**6, 2**31 + 5, 2**40, -1, -(2**40)])
def test_a_label_out_of_range_poisons_its_row_and_no_other(backend, wrong):
    (hidden, weight), labels = token_problem()
    labels = labels.clamp(min=0)
    bad = labels.clone()
    bad[0, 7] = wrong
    keep = bad == labels

    def rows(chosen):
        options = {"reduction": "none", "chunk_bytes": 20 * 301 * 8, "backend": served(backend)}
        losses = nitp_ops.linear_cross_entropy(hidden, weight, chosen, **options)
        return losses.detach(), torch.autograd.grad(losses[keep].sum(), hidden)[0]

    (dirty, d_dirty), (clean, d_clean) = rows(bad), rows(labels)
    assert dirty[0, 7].isnan()
    assert torch.equal(dirty[keep], clean[keep]) and torch.equal(d_dirty[keep], d_clean[keep])
    assert nitp_ops.linear_cross_entropy(hidden, weight, bad, backend=backend).isnan()
    torch.cuda.synchronize()  # a wild read would be an error here at the latest


@BACKENDS
@pytest.mark.parametrize("rows", [0, 37])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_that_counts_gives_zero_loss_and_zero_gradients(backend, rows, reduction):
    hidden, weight, *projector = tensors()
    absent = torch.full((2, rows), -100, device=DEVICE)
    options = {"reduction": reduction, "backend": served(backend)}
    token = outputs(
        lambda h, w: nitp_ops.linear_cross_entropy(h[:, :rows], w, absent, **options),
        [hidden, weight],
    )
    latent = outputs(
        lambda h, *w: nitp_ops.implicit_token_loss(
            h[:, :rows], h[:, :rows].detach(), *w, valid=absent >= 0, **options
        ),
        [hidden, *projector],
    )
    assert all((x == 0).all() for x in (*token, *latent))


@BACKENDS
@pytest.mark.parametrize("chunk_rows", [65536, 5000])
def test_float16_gradients_of_a_large_count_do_not_underflow(backend, chunk_rows):
    """p / count is 1e-8 here, under float16's least number, 6e-8; the gradients themselves are not."""
    hidden = (1 + normal(65536, 32)).half().requires_grad_()
    weight = normal(2048, 32, seed=1, scale=0.05, dtype=torch.float16).requires_grad_()
    labels = torch.arange(65536, device=DEVICE) % 7  # few classes: the others' gradients are all p
    loss = partial(
        nitp_ops.linear_cross_entropy,
        labels=labels,
        chunk_bytes=chunk_rows * 2048 * 2,
        backend=served(backend),
    )
    ours = outputs(loss, [hidden, weight])
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = outputs(lambda h, w: reference.linear_cross_entropy(h, w, labels), wide)
    near(
        [ours[0], ours[2][7:]],
        [exact[0], exact[2][7:]],
        ["loss", "d unembedding of absent classes"],
    )
    absent, absent_exact = ours[2][7:].double(), exact[2][7:]
    assert (absent - absent_exact).norm() < 0.01 * absent_exact.norm()
    # a row's gradient is near 1e-6, where float16 has steps of 6e-8: half a step each at most
    assert (ours[1].double() - exact[1]).abs().max() <= 2**-25 + 0.01 * exact[1].abs().max()


@BACKENDS
def test_autocast_decides_the_dtype_of_the_products(backend):
    hidden, weight, *projector = tensors()
    labels, target = labels_and_target()
    half = [x.detach().bfloat16() for x in (hidden, weight, *projector)]
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        token = nitp_ops.linear_cross_entropy(hidden, weight, labels, backend=served(backend))
        latent = nitp_ops.implicit_token_loss(hidden, target, *projector, backend=backend)
    assert token.dtype == latent.dtype == torch.float32
    assert torch.equal(
        token, nitp_ops.linear_cross_entropy(half[0], half[1], labels, backend=backend)
    )
    assert torch.equal(
        latent, nitp_ops.implicit_token_loss(half[0], target, *half[2:], backend=backend)
    )
    assert all(
        g.dtype == torch.float32
        for g in torch.autograd.grad(token + latent, (hidden, weight, *projector))
    )


@BACKENDS
def test_frozen_tensors_get_no_gradient_and_cost_none(backend):
    hidden, weight, *_ = tensors(torch.float64)
    labels, _ = labels_and_target()
    loss = partial(nitp_ops.linear_cross_entropy, labels=labels, backend=served(backend))
    both = outputs(loss, [hidden, weight])
    close(outputs(loss, [hidden, weight.detach()])[1], both[1])
    close(outputs(loss, [hidden.detach(), weight])[1], both[2])
