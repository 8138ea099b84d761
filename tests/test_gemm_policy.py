"""What the passes choose for the GEMMs of a GPU: pure functions of device, dtype and shape, and their effect on CPU."""

from contextlib import nullcontext

import pytest
import torch
from budget import outputs
from without_reading import without_reading

import nitp_ops
from benchmarks import cases
from nitp_ops import _gemm, _token_chunks, torch_rows
from nitp_ops._chunks import row_stride

ROWS, WIDTH, VOCABULARY = 65, 32, 301


def way(reads, kernels=None):
    """The passes as on CPU, or as where the host reads no values."""
    return nullcontext() if reads else without_reading(kernels)


def head(dtype=torch.float32):
    hidden, weight = torch.randn(ROWS, WIDTH).to(dtype), (torch.randn(VOCABULARY, WIDTH) / 4).to(dtype)
    labels = torch.randint(0, VOCABULARY, (ROWS,))
    labels[::7] = -100
    return [hidden.requires_grad_(), weight.requires_grad_()], labels


def test_rows_of_logits_are_padded_on_cuda_where_they_would_begin_anywhere():
    assert [row_stride(columns, "cuda") for columns in (1, 50257, 50304, 128256)] == [64, 50304, 50304, 128256]
    assert {row_stride(columns, device) for columns in (50257,) for device in ("cpu", "mps", "xpu")} == {50257}
    plan = nitp_ops.explain("linear_cross_entropy", rows=8192, width=8, vocabulary=50257, device="cuda")
    assert plan.workspace_bytes == plan.chunk_rows * 50304 * 4


@pytest.mark.parametrize("options", [{}, {"chunk_bytes": 30 * 320 * 4}, {"softcap": 5.0, "label_smoothing": 0.1}])
@pytest.mark.parametrize(("reads", "kernels"), [(True, None), (False, None), (False, torch_rows)])
def test_a_gap_behind_each_row_of_logits_changes_no_bit(monkeypatch, kernels, reads, options):
    inputs, labels = head()
    bias = torch.randn(VOCABULARY, requires_grad=True)

    def run():
        def loss(hidden, weight, bias):
            return nitp_ops.linear_cross_entropy(hidden, weight, labels, bias=bias, **options)

        with way(reads, kernels):
            return outputs(loss, [*inputs, bias])

    dense, seen, times = run(), [], _gemm.Weight.times
    monkeypatch.setattr(_token_chunks, "row_stride", lambda columns, device: row_stride(columns, "cuda"))
    monkeypatch.setattr(_gemm.Weight, "times", lambda *given: seen.append(given[2].stride()) or times(*given))
    padded = run()
    assert set(seen) == {(320, 1)}
    for a, b in zip(padded, dense, strict=True):
        assert torch.equal(a, b)


def test_the_gemms_that_a_benchmark_compares_with_have_the_same_rows(monkeypatch):
    monkeypatch.setattr(cases, "row_stride", lambda columns, device: row_stride(columns, "cuda"))
    sizes = {"N": 16, "d": 8, "V": 301}
    layers = cases.OPS["linear_cross_entropy"].layers
    assert layers is not None
    logits, d_hidden, d_weight = cases.products(layers(sizes), torch.float32)
    assert logits[2].stride() == d_hidden[0].stride() == (320, 1) and d_weight[0].stride() == (1, 320)
