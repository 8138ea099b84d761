"""On CPU a GEMM has an even number of rows: what a chunk lacks is filled with zeros, which
no output shows."""

import pytest
import torch

from nitp_ops import explain, implicit_token_loss, linear_cross_entropy
from nitp_ops.core.chunking import with_zeros
from nitp_ops.core.gemm import has_native_gemm, pad_to_alignment
from tests.support.budget import close, outputs

CPU = torch.device("cpu")
COUNTS = [1, 7, 8, 9, 15, 23, 2049]


@pytest.mark.parametrize(
    ("rows", "even"),
    [(0, 0), (3, 3), (8, 8), (9, 16), (511, 512), (2047, 2048), (2049, 2064), (4096, 4096)],
)
def test_a_product_has_a_multiple_of_eight_rows_and_of_sixteen_where_they_are_many(rows, even):
    assert pad_to_alignment(rows, CPU, torch.float64) == even
    assert pad_to_alignment(rows, torch.device("cuda"), torch.float64) == rows
    for dtype in (torch.float32, torch.bfloat16):
        assert pad_to_alignment(rows, CPU, dtype) == (
            rows if has_native_gemm("cpu", dtype) else even
        )


def test_explain_counts_the_zeros():
    plan = explain("linear_cross_entropy", rows=9, width=4, vocabulary=10, dtype=torch.float64)
    assert plan.workspace_bytes == 16 * 10 * 8


def test_a_chunk_that_is_even_is_not_copied():
    chunk = torch.randn(8, 3)
    assert with_zeros(chunk, 8) is chunk
    assert torch.equal(with_zeros(chunk, 16), torch.cat([chunk, torch.zeros(8, 3)]))


def agree(op, inputs):
    native, plain = (
        outputs(lambda *tensors, backend=backend: op(*tensors, backend=backend), inputs)
        for backend in ("native", "reference")
    )
    for a, b in zip(native, plain, strict=True):
        close(a, b)


@pytest.mark.parametrize("rows", COUNTS)
def test_the_token_loss_does_not_see_the_zeros(rows):
    hidden = torch.randn(rows, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(rows) % 11
    agree(
        lambda h, w, b, **options: linear_cross_entropy(h, w, labels, bias=b, **options),
        [hidden, weight, bias],
    )


@pytest.mark.parametrize("rows", COUNTS)
def test_the_latent_loss_does_not_see_the_zeros(rows):
    hidden = torch.randn(rows + 1, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randn(rows + 1, 6, dtype=torch.float64)
    projector = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((8, 6), (8, 6), (6, 8))
    ]
    agree(implicit_token_loss, [hidden, target, *projector])


def test_a_word_at_minus_infinity_gets_no_gradient_from_the_zeros():
    """0 times infinity is no number, and the sum over the chunk's rows is the gradient of that
    word."""
    hidden = torch.rand(9, 4, dtype=torch.float64) + 0.1
    weight = torch.randn(7, 4, dtype=torch.float64)
    weight[3] = -float("inf")
    weight.requires_grad_()
    linear_cross_entropy(hidden, weight, torch.zeros(9, dtype=torch.int64)).backward()
    assert weight.grad is not None and weight.grad.isfinite().all()
    assert (weight.grad[3] == 0).all()
