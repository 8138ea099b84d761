"""How many rows a chunk has by default, and what `explain` says of it."""

import pytest
import torch

import nitp_ops
from nitp_ops.core import chunking, gemm
from nitp_ops.ops.cross_entropy import chunked as token_chunks
from nitp_ops.ops.implicit_token import chunk_rows as latent_chunks


def test_the_default_chunk_follows_the_weight_gradient_within_bounds():
    def plan(width, vocabulary, dtype=torch.float32, **options):
        return nitp_ops.explain(
            "linear_cross_entropy",
            rows=4096,
            width=width,
            vocabulary=vocabulary,
            dtype=dtype,
            **options,
        )

    small = plan(64, 1000)
    assert small.workspace_bytes <= 32 * 2**20 and small.chunks == 1
    middle = plan(512, 32000)
    assert 32 * 2**20 < middle.workspace_bytes <= 4 * 512 * 32000 and middle.accumulator_bytes == 0
    assert plan(1024, 50304).workspace_bytes <= 120 * 2**20
    large = plan(896, 151936)
    assert 120 * 2**20 < large.workspace_bytes <= 240 * 2**20 and large.chunk_rows > 256
    assert plan(896, 151936, torch.bfloat16).chunk_rows == 512
    planned = plan(64, 1000, chunk_bytes=40_000)
    assert (planned.chunk_rows, planned.chunks) == (8, 512)
    assert nitp_ops.explain("implicit_token_loss", rows=7, width=1280).flops == 7 * 72 * 1280**2


@pytest.mark.parametrize("width", [1280, 4096, 16384])
def test_a_gpu_takes_8192_rows_whatever_the_width(width):
    sizes = {"width": width, "vocabulary": 128256, "device": "cuda"}
    for dtype in (torch.bfloat16, torch.float32):
        few, many = (
            nitp_ops.explain("linear_cross_entropy", rows=n, dtype=dtype, **sizes)
            for n in (8192, 2**20)
        )
        assert (few.chunks, few.chunk_rows, few.accumulator_bytes) == (1, 8192, 0)
        assert (many.chunks, many.chunk_rows) == (128, 8192)
        assert many.workspace_bytes == 8192 * 128256 * dtype.itemsize


def test_a_projector_on_a_gpu_takes_more_than_a_gibibyte_or_8192_rows():
    def plan(rows, width):
        return nitp_ops.explain(
            "implicit_token_loss", rows=rows, width=width, dtype=torch.bfloat16, device="cuda"
        )

    for rows, width in ((16384, 1280), (16384, 2048), (8192, 4096)):
        assert plan(rows, width).chunks == 1 and plan(rows, width).workspace_bytes <= 1280 * 2**20
    assert 0.95 * 1280 * 2**20 < plan(2**20, 2048).workspace_bytes <= 1280 * 2**20
    assert plan(2**20, 16384).chunk_rows == 8192


def test_a_gpu_takes_all_rows_in_one_chunk_where_that_costs_less_than_a_float32_sum():
    def plan(rows, dtype=torch.bfloat16):
        sizes = {"width": 4096, "vocabulary": 128256, "device": "cuda"}
        return nitp_ops.explain("linear_cross_entropy", rows=rows, dtype=dtype, **sizes)

    # the gradient's float32 sum takes as much more than itself in bfloat16 as 4096 rows of logits
    # do
    whole, narrow = plan(8192 + 4096), plan(8192 + 4096 + 8)
    assert whole.chunks == 1 and whole.accumulator_bytes == 0
    assert narrow.chunks == 2 and narrow.workspace_bytes < whole.workspace_bytes
    assert whole.workspace_bytes == 8192 * 128256 * 2 + narrow.accumulator_bytes // 2
    for dtype in (torch.float32, torch.float16):  # whose sum is, or waits as, a float32 gradient
        assert plan(8192 + 8, dtype).chunks == 2
    sizes = 8192 * 2, None, 4096 * 4096
    assert chunking.rows_per_chunk(10000, *sizes, device="cuda", itemsize=2) == 10000
    assert chunking.rows_per_chunk(10000, *sizes, device="cuda", itemsize=4) == 5000


@pytest.mark.parametrize("narrow", [True, False])
def test_one_chunk_is_worth_more_only_where_the_gradient_is_as_narrow_as_the_gemms(
    monkeypatch, narrow
):
    seen = []

    def spy(rows, *sizes, itemsize, **options):
        seen.append(itemsize)
        return chunking.rows_per_chunk(rows, *sizes, itemsize=itemsize, **options)

    monkeypatch.setattr(token_chunks, "rows_per_chunk", spy)
    monkeypatch.setattr(latent_chunks, "rows_per_chunk", spy)
    monkeypatch.setattr(gemm, "_WITHOUT_GEMM", set())
    hidden, weight = (torch.randn(8, 8, requires_grad=True) for _ in range(2))
    if narrow:
        hidden, weight = (x.detach().bfloat16().requires_grad_() for x in (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # bfloat16 GEMMs in either case
        nitp_ops.linear_cross_entropy(hidden, weight, torch.arange(8))
        nitp_ops.implicit_token_loss(hidden, hidden.detach(), None, None, weight)
    assert set(seen) == {2 if narrow else 4}


def test_terms_that_share_a_pass_have_chunks_smaller_than_the_weight_gradient():
    def plan(terms, rows):
        sizes = {"width": 1024, "vocabulary": 25_000, "dtype": torch.bfloat16}
        return nitp_ops.explain("linear_cross_entropy", rows=rows, terms=terms, **sizes)

    gradient = 4 * 1024 * 25_000
    one, four = plan(1, 8192), plan(4, 8192)
    assert 0.9 * gradient < one.workspace_bytes <= gradient
    assert 0.5 * gradient < four.workspace_bytes <= 0.6 * gradient
    assert (four.flops, four.accumulator_bytes) == (4 * one.flops, one.accumulator_bytes)
    # and no larger than the longest term, unless that is small: then terms share chunks
    assert (plan(4, 801).chunk_rows, plan(4, 801).chunks) == (808, 4)
    few = plan(4, 100)
    assert (few.chunk_rows, few.chunks) == (400, 1)
    on_a_gpu = nitp_ops.explain(
        "linear_cross_entropy", rows=100, width=64, vocabulary=99, terms=4, device="cuda"
    )
    assert on_a_gpu.chunks == 4  # it is not known on the host there which terms are inactive
    with pytest.raises(ValueError, match="terms is 2, expected 1"):
        nitp_ops.explain("implicit_token_loss", rows=1, width=8, terms=2)
