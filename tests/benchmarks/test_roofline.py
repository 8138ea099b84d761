"""`benchmarks.measure.roofline`: the model's figures, its agreement with a GPU that was measured,
and its bytes law."""

import pytest
import torch

import nitp_ops
from benchmarks.cases import OPS
from benchmarks.measure import roofline
from benchmarks.measure.roofline import H200, Cost, Rates, cost
from tests.core.without_reading import without_reading
from tests.support.small_kernels import SmallKernels

#: A GPU of 3.0 TB/s on which bfloat16 GEMMs of these sizes ran at 750 TFLOP/s.
H100 = Rates(750e12, 3.0e12)
OP = "implicit_token_loss"


def head(n, d, v):
    return {"N": n, "d": d, "V": v}


@pytest.mark.parametrize(
    ("op", "sizes", "reach"),
    [
        ("linear_cross_entropy", head(4096, 4096, 128256), 1.04),
        ("linear_cross_entropy", head(8192, 4096, 128256), 1.03),
        ("linear_cross_entropy", head(16384, 2048, 151936), 1.08),
        ("implicit_token_loss", {"N": 8192, "d": 4096}, 1.06),
        ("implicit_token_loss", {"N": 16384, "d": 2048}, 1.11),
        ("implicit_token_loss", {"N": 16384, "d": 1280}, 1.20),
    ],
)
def test_an_h200_should_take_this_many_times_the_gemms_at_most(op, sizes, reach):
    assert reach - 0.03 < cost(op, sizes).ratio(H200) <= reach + 0.005


@pytest.mark.parametrize(
    ("op", "sizes", "chunks", "found"),
    [
        ("linear_cross_entropy", head(8192, 4096, 128256), 1, 1.02),
        ("linear_cross_entropy", head(8192, 4096, 128256), 2, 1.08),
        ("linear_cross_entropy", head(8192, 4096, 128256), 4, 1.10),
        ("linear_cross_entropy", head(16384, 2048, 151936), 4, 1.17),
        ("linear_cross_entropy", head(16384, 2048, 151936), 2, 1.14),
        ("linear_cross_entropy", head(16384, 2048, 151936), 1, 1.13),
        ("implicit_token_loss", {"N": 16384, "d": 1280}, 2, 1.28),
        ("implicit_token_loss", {"N": 16384, "d": 2048}, 2, 1.21),
        ("implicit_token_loss", {"N": 8192, "d": 4096}, 1, 1.08),
    ],
)
def test_an_h100_took_about_that(op, sizes, chunks, found):
    """Measured on 2026-11-26 at commit 1e48a0d, which moved more (decision 0036)."""
    now = cost(op, sizes, chunks)
    copied, launches = 0.0, 15 + 10 * chunks
    if op == "linear_cross_entropy":  # its kernel took 1.15 of a copy
        copied = (1.15 / roofline.CROSS_ENTROPY - 1) * now.row_bytes
    if op == "implicit_token_loss":  # hidden states masked, its gradient zeroed, gate and up joined
        copied, launches = 6 * sizes["N"] * sizes["d"] + 32 * sizes["d"] ** 2, 29 + 7 * chunks
    then = Cost(now.flops, now.row_bytes, now.sum_bytes + copied, launches)
    assert then.ratio(H100) == pytest.approx(found, abs=0.04)


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_a_call_launches_no_more_small_kernels_than_the_model_says(chunks):
    n, d, v = 64, 48, 304
    hidden, weight = (torch.randn(m, d).bfloat16().requires_grad_() for m in (n, v))
    labels = torch.randint(0, v, (n,))
    with without_reading(), SmallKernels() as count:
        nitp_ops.linear_cross_entropy(
            hidden, weight, labels, chunk_bytes=2 * n * v // chunks
        ).backward()
    # of few chunks the weight gradient needs no cast
    assert (
        0
        <= cost("linear_cross_entropy", head(n, d, v), chunks).launches - count.launched.total()
        <= 1
    )


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_a_call_of_nitp_launches_no_more_small_kernels_than_the_model_says(chunks):
    batch, length, d = 2, 33, 48
    hidden, target = (torch.randn(batch, length, d).bfloat16() for _ in range(2))
    sizes = (4 * d, d), (4 * d, d), (d, 4 * d)
    gate, up, down = (torch.randn(each).bfloat16().requires_grad_() for each in sizes)

    def made(size: int) -> int:
        return nitp_ops.explain(
            OP, rows=batch * length, width=d, dtype=torch.bfloat16, device="cuda", chunk_bytes=size
        ).chunks

    size = next(size for size in range(2**18, 0, -256) if made(size) == chunks)
    call = nitp_ops.implicit_token_loss
    with without_reading(), SmallKernels() as count:
        call(hidden.requires_grad_(), target, gate, up, down, chunk_bytes=size).backward()
    assert (
        0 <= cost(OP, {"N": batch * length, "d": d}, chunks).launches - count.launched.total() <= 2
    )


def test_the_bytes_of_the_weight_gradient_s_sum_grow_with_the_chunks():
    sizes = head(64, 8, 40)
    one, two, three = (
        cost("linear_cross_entropy", sizes, chunks).sum_bytes / (8 * 40) for chunks in (1, 2, 3)
    )
    assert (one, two, three) == (0, 6 + roofline.SUM * 10, 6 + roofline.SUM * 18)
    assert (
        cost("implicit_token_loss", {"N": 64, "d": 8}, 2).sum_bytes
        == (6 + roofline.SUM * 10) * 12 * 64
    )
    assert cost("linear_cross_entropy", sizes).sum_bytes == 0


def test_the_chunks_are_those_that_the_op_makes_on_a_gpu():
    assert roofline.chunks_of("linear_cross_entropy", head(16384, 2048, 151936)) == 2
    assert roofline.chunks_of("implicit_token_loss", {"N": 16384, "d": 1280}) == 1
    for name, sizes in OPS["linear_cross_entropy"].cuda.items():
        size = {"rows": sizes["N"], "width": sizes["d"], "vocabulary": sizes["V"]}
        plan = nitp_ops.explain("linear_cross_entropy", **size, dtype=torch.bfloat16, device="cuda")
        assert roofline.chunks_of("linear_cross_entropy", sizes) == plan.chunks, name


def test_faster_memory_brings_the_ratio_down_to_the_launches():
    found = cost("linear_cross_entropy", head(4096, 4096, 128256))
    assert found.ratio(Rates(H200.flops, 1e30, 0.0)) == 1
    assert found.ratio(Rates(H200.flops, 1e30)) == pytest.approx(
        1 + 12 * 2.5e-6 * H200.flops / found.flops
    )


def test_what_two_losses_take_is_what_they_take_together():
    sizes = head(16384, 1280, 152064)
    flops = 1 + OPS["implicit_token_loss"].flops(sizes) / OPS["linear_cross_entropy"].flops(sizes)
    free = Rates(H200.flops, 1e30, 0.0)
    assert roofline.overhead_ratio(sizes, free) == pytest.approx(flops)
    assert flops < roofline.overhead_ratio(sizes, H200) < flops + 0.05


def test_rates_are_the_measured_ones_where_both_are_there():
    records = [{"op": "ceiling", "implementation": "gemm", "per_second": 7e14}]
    assert roofline.measured_rates({"records": records}) is None
    records += [{"op": "ceiling", "implementation": "copy", "skipped": "OutOfMemoryError"}]
    assert roofline.measured_rates({"records": records}) is None
    records[-1] = {"op": "ceiling", "implementation": "copy", "per_second": 4e12}
    assert roofline.measured_rates({"records": records}) == Rates(7e14, 4e12)
    assert roofline.measured_rates({}) is None
