"""What the passes choose for the GEMMs of a GPU: pure functions of device, dtype and shape, and
their effect on CPU."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch

import nitp_ops
from benchmarks import cases
from nitp_ops import reference
from nitp_ops.core import gemm
from nitp_ops.core.chunking import row_stride
from nitp_ops.kernels import torch_rows
from nitp_ops.ops.cross_entropy import chunked, head_pass
from tests.core.without_reading import without_reading
from tests.support.budget import EPS, outputs, widened, within_budget

ROWS, WIDTH, VOCABULARY = 65, 32, 301


@pytest.fixture
def widening(monkeypatch):
    """GEMMs that write float32 beside narrow operands, as CUDA has them; returns the operands' and
    results' dtypes."""
    seen, plain = [], gemm.matmul

    def matmul(a, b, out, *, add=False):
        seen.append((a.dtype, out.dtype))
        if a.dtype == out.dtype:
            return plain(a, b, out, add=add)
        return out.copy_(a.float() @ b.float() + (out if add else 0))

    monkeypatch.setattr(gemm, "matmul", matmul)
    monkeypatch.setattr(gemm, "writes_float32", lambda device, dtype: True)
    return seen


def way(reads, kernels=None):
    """The passes as on CPU, or as where the host reads no values."""
    return nullcontext() if reads else without_reading(kernels)


def head(dtype=torch.float32):
    hidden, weight = (
        torch.randn(ROWS, WIDTH).to(dtype),
        (torch.randn(VOCABULARY, WIDTH) / 4).to(dtype),
    )
    labels = torch.randint(0, VOCABULARY, (ROWS,))
    labels[::7] = -100
    return [hidden.requires_grad_(), weight.requires_grad_()], labels


def test_rows_of_logits_are_padded_on_cuda_where_they_would_begin_anywhere():
    assert [row_stride(columns, "cuda") for columns in (1, 50257, 50304, 128256)] == [
        64,
        50304,
        50304,
        128256,
    ]
    assert {
        row_stride(columns, device) for columns in (50257,) for device in ("cpu", "mps", "xpu")
    } == {50257}
    plan = nitp_ops.explain(
        "linear_cross_entropy", rows=8192, width=8, vocabulary=50257, device="cuda"
    )
    assert plan.workspace_bytes == plan.chunk_rows * 50304 * 4


@pytest.mark.parametrize(
    "options", [{}, {"chunk_bytes": 30 * 320 * 4}, {"softcap": 5.0, "label_smoothing": 0.1}]
)
@pytest.mark.parametrize(("reads", "kernels"), [(True, None), (False, None), (False, torch_rows)])
def test_a_gap_behind_each_row_of_logits_changes_no_bit(monkeypatch, kernels, reads, options):
    inputs, labels = head()
    bias = torch.randn(VOCABULARY, requires_grad=True)

    def run():
        def loss(hidden, weight, bias):
            return nitp_ops.linear_cross_entropy(hidden, weight, labels, bias=bias, **options)

        with way(reads, kernels):
            return outputs(loss, [*inputs, bias])

    dense, seen, times = run(), [], gemm.Weight.forward
    for module in (chunked, head_pass):
        monkeypatch.setattr(
            module, "row_stride", lambda columns, device: row_stride(columns, "cuda")
        )
    monkeypatch.setattr(
        gemm.Weight, "forward", lambda *given: seen.append(given[2].stride()) or times(*given)
    )
    padded = run()
    assert set(seen) == {(320, 1)}
    for a, b in zip(padded, dense, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gemm_on_cuda_that_may_split_its_sum_goes_through_float32(widening, monkeypatch, dtype):
    assert gemm.sums_in_float32("cuda", dtype, 64 * 1024)
    assert not gemm.sums_in_float32("cuda", dtype, 4096 * 4096)  # tiles enough
    assert not gemm.sums_in_float32("cuda", torch.float32, 64) and not gemm.sums_in_float32(
        "cpu", dtype, 64
    )
    a, b = torch.randn(16, 4096).to(dtype), torch.randn(4096, 24).to(dtype)
    monkeypatch.setattr(gemm, "sums_in_float32", lambda *given: True)
    once = (a.float() @ b.float()).to(dtype)
    out = torch.full_like(once, 3)
    assert torch.equal(gemm.matmul(a, b, out), once) and torch.equal(out, once)
    gemm.matmul(a, b, out.fill_(3), add=True)
    assert torch.equal(out, (a.float() @ b.float() + 3).to(dtype))
    assert (dtype, torch.float32) in widening


def test_float32_logits_come_from_narrow_operands_only_where_those_are_all_there_is():
    bf16, fp16, f32 = torch.bfloat16, torch.float16, torch.float32
    assert gemm.operand_dtype("cuda", bf16, [bf16, bf16], f32) == bf16
    assert gemm.operand_dtype("cuda", fp16, [fp16], f32) == fp16
    # hidden states that would be rounded
    assert gemm.operand_dtype("cuda", bf16, [bf16, f32], f32) == f32
    assert gemm.operand_dtype("cpu", bf16, [bf16], f32) == f32
    assert gemm.operand_dtype("cuda", f32, [bf16], f32) == f32
    assert gemm.operand_dtype("cuda", bf16, [bf16], bf16) == bf16


def as_on_cuda(monkeypatch):
    of_device = gemm.operand_dtype
    monkeypatch.setattr(gemm, "operand_dtype", lambda device, *given: of_device("cuda", *given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunks", [1, 5])
@pytest.mark.parametrize("reads", [True, False])
def test_float32_logits_of_narrow_operands_stay_in_the_budget(
    widening, monkeypatch, dtype, chunks, reads
):
    as_on_cuda(monkeypatch)
    inputs, labels = head(dtype)
    size = -(-ROWS // chunks) * VOCABULARY * 6
    options = {"logits_dtype": torch.float32, "chunk_bytes": size}
    widening.clear()

    def loss(hidden, weight):
        return nitp_ops.linear_cross_entropy(hidden, weight, labels, **options)

    with way(reads):
        ours = outputs(loss, inputs)
    assert {operands for operands, _ in widening} == {dtype}  # no widened weight
    assert sum(wide == torch.float32 for _, wide in widening) >= chunks  # the logits
    exact = outputs(lambda h, w: reference.linear_cross_entropy(h, w, labels), widened(inputs))
    eager = outputs(lambda h, w: reference.linear_cross_entropy(h, w, labels), inputs)
    within_budget(ours, eager, exact)
    # narrow logits: 1e-4 and more
    assert abs(ours[0].item() / exact[0].item() - 1) < 4 * EPS[torch.float32]


def test_the_workspace_of_float32_logits_holds_their_rounded_gradient_where_one_is_wanted(
    widening, monkeypatch
):
    as_on_cuda(monkeypatch)
    with (
        mock.patch.object(chunked, "rows_per_chunk", wraps=chunked.rows_per_chunk) as planned,
        mock.patch.object(head_pass, "workspace", wraps=head_pass.workspace) as made,
    ):
        (hidden, weight), labels = head(torch.bfloat16)
        nitp_ops.linear_cross_entropy(hidden, weight, labels, logits_dtype=torch.float32)
        assert {call.args[1] for call in planned.call_args_list} == {VOCABULARY * (4 + 2)}
        assert [call.args[1] for call in made.call_args_list] == [torch.float32, torch.bfloat16]
        made.reset_mock()
        with torch.no_grad():
            nitp_ops.linear_cross_entropy(hidden, weight, labels, logits_dtype=torch.float32)
        assert [call.args[1] for call in made.call_args_list] == [torch.float32]


def test_the_gemms_that_a_benchmark_compares_with_have_the_same_rows(monkeypatch):
    monkeypatch.setattr(cases, "row_stride", lambda columns, device: row_stride(columns, "cuda"))
    sizes = {"N": 16, "d": 8, "V": 301}
    layers = cases.OPS["linear_cross_entropy"].layers
    assert layers is not None
    logits, d_hidden, d_weight = cases.gemms(layers(sizes), torch.float32)
    assert logits[2].stride() == d_hidden[0].stride() == (320, 1) and d_weight[0].stride() == (
        1,
        320,
    )
