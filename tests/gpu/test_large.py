"""On a GPU rows beyond 2^31 numbers are found: offsets are 64 bits wide in every kernel."""

import pytest
import torch

import nitp_ops
from nitp_ops import reference
from tests.gpu.gpu_cases import BACKENDS, DEVICE, ON_GPU, served
from tests.support.budget import close

pytestmark = [*ON_GPU, pytest.mark.large]

LIMIT = 2**31


def made(*shape, seed, scale=1.0):
    """Random bfloat16 on the device, which alone is fast enough for it."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.bfloat16).mul_(scale)


def around(rows, width):
    """The first and last rows, and those on both sides of 2^31 numbers."""
    crossing = LIMIT // width
    assert 8 < crossing < rows - 8
    return torch.cat(
        [torch.arange(first, first + 8, device=DEVICE) for first in (0, crossing - 4, rows - 8)]
    )


@BACKENDS
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_chunk_of_more_than_two_billion_logits(backend, reduction):
    rows, width, vocabulary = 17000, 64, 131072
    hidden = made(rows, width, seed=0).requires_grad_()
    weight = made(vocabulary, width, seed=1, scale=width**-0.5).requires_grad_()
    labels = torch.randint(vocabulary, (rows,), device=DEVICE)
    labels[-3:] = vocabulary - 1  # the last logit of the last rows
    options = {"chunk_bytes": rows * vocabulary * 2, "backend": served(backend)}
    loss, stats = nitp_ops.linear_cross_entropy(
        hidden, weight, labels, reduction=reduction, return_stats=True, **options
    )
    d_hidden, d_weight = torch.autograd.grad(loss.sum(), (hidden, weight))
    some = around(rows, vocabulary)
    wide = hidden.detach()[some].double().requires_grad_()
    exact = reference.linear_cross_entropy(
        wide, weight.detach().double(), labels[some], reduction="none"
    )
    close(stats.loss[some], exact, 1e-2)
    for row, expected in zip(
        d_hidden[some], torch.autograd.grad(exact.sum(), wide)[0], strict=True
    ):
        close(row, expected, 5e-2)
    # the weight's gradient sums every row: in float64, a chunk at a time
    wide_weight = weight.detach().double().requires_grad_()
    for first in range(0, rows, 1000):
        part = slice(first, first + 1000)
        hidden_part = hidden.detach()[part].double()
        reference.linear_cross_entropy(
            hidden_part, wide_weight, labels[part], reduction="sum"
        ).backward()
    assert wide_weight.grad is not None
    close(d_weight, wide_weight.grad, 2e-2)


@BACKENDS
def test_swiglu_of_more_than_two_billion_numbers(backend):
    rows, width = 33000, 65537  # an odd width: no two rows are aligned alike
    gate, up = (
        made(rows, width, seed=0).requires_grad_(),
        made(rows, width, seed=1).requires_grad_(),
    )
    out = nitp_ops.swiglu(gate, up, backend=served(backend))
    d_gate, d_up = torch.autograd.grad(out, (gate, up), torch.ones_like(out))
    some = around(rows, width)
    wide = [x.detach()[some].double().requires_grad_() for x in (gate, up)]
    exact = reference.swiglu(*wide)
    gradients = torch.autograd.grad(exact.sum(), wide)
    for ours, expected in zip((out, d_gate, d_up), (exact, *gradients), strict=True):
        for a, b in zip(ours[some], expected, strict=True):
            close(a, b, 1e-2)


@BACKENDS
def test_alignment_of_more_than_two_billion_numbers(backend):
    rows, width = 1100000, 2001
    prediction, target = made(rows, width, seed=0).requires_grad_(), made(rows, width, seed=1)
    loss = nitp_ops.alignment(prediction, target, backend=served(backend))
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    some = around(rows, width)
    wide = prediction.detach()[some].double().requires_grad_()
    exact = reference.alignment(wide, target[some].double())
    close(loss[some], exact, 1e-4)
    for a, b in zip(gradient[some], torch.autograd.grad(exact.sum(), wide)[0], strict=True):
        close(a, b, 1e-2)


@BACKENDS
def test_implicit_token_loss_reads_targets_beyond_two_billion_numbers(backend):
    """No projector and a target of one row among many: the row is found by its index."""
    rows, width = 1100000, 2001
    hidden, target = made(1, rows, width, seed=0).requires_grad_(), made(1, rows, width, seed=1)
    valid = torch.zeros(1, rows, dtype=torch.bool, device=DEVICE)
    some = around(rows - 9, width)
    valid[0, some] = True
    options = {"valid": valid, "reduction": "sum", "max_rows": 64, "backend": served(backend)}
    loss = nitp_ops.implicit_token_loss(hidden, target, None, None, None, **options)
    (gradient,) = torch.autograd.grad(loss, hidden)
    wide = hidden.detach()[0, some].double().requires_grad_()
    exact = reference.alignment(wide, target[0, some + 1].double()).sum()
    close(loss, exact, 1e-4)
    for a, b in zip(gradient[0, some], torch.autograd.grad(exact, wide)[0], strict=True):
        close(a, b, 1e-2)
