"""The CUDA kernels of the cross-entropy on rows that cost digits: far offsets, infinities, softcaps
of Gemma's kind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cuda_source.build_for_cpu import H200_SHARED, choose, placed, untouched
from tests.kernels.cuda_source.test_operators import (
    NAN,
    NARROW,
    ours_and_exact,
    same,
)
from tests.support.budget import EPS

pytestmark = pytest.mark.gpu_source

HALVES = [torch.bfloat16, torch.float16]
#: One block from registers; clusters of eight, a part of whose rows is read again.
DEVICES = {"block": (H200_SHARED, 1, 1024), "cluster": (6000, 8, 128)}


def device(name, order="shuffled"):
    shared_bytes, cluster, threads = DEVICES[name]
    choose(order, shared_bytes, cluster, threads)


def wide_or_not(columns, dtype):
    return columns if dtype == torch.float32 else 2 * columns


@settings(max_examples=40)
@given(
    st.sampled_from([9, 700, 4103, 9000]),
    st.sampled_from(HALVES),
    st.sampled_from(list(DEVICES)),
    st.sampled_from([4.0, 30.0, 1000.0, 5000.0]),
    st.sampled_from(
        [
            {},
            {"smoothing": 0.1},
            {"smoothing": 0.1, "z_loss": 0.01, "gradient": False},
            {"partials": True},
        ]
    ),
    st.sampled_from([1.0, 0.6]),
    st.integers(0, 2**31),
)
def test_capped_rows_of_half_precision(columns, dtype, where, cap, options, scale, seed):
    torch.manual_seed(seed)
    device(where)
    logits = (12 * torch.randn(3, columns)).to(dtype)
    labels = torch.randint(0, columns, (3, 2))
    labels[0, 1] = labels[0, 0]
    labels[1, 0] = -100
    rows = placed(logits, 3, columns + 3)
    options = {**options, "softcap": cap, "scale": scale, "target_weight": torch.rand(3, 2)}
    same(*ours_and_exact(rows, labels, **options))
    assert untouched(rows)


@pytest.mark.parametrize("cap", [15.0, 30.0])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("where", DEVICES)
def test_what_a_capped_row_tells_of_its_logits_is_exact(where, dtype, cap):
    """The approximate tanh reaches the gradient alone, where the rounding of the output hides it."""
    device(where)
    logits = (12 * torch.randn(2, 5000)).to(dtype)
    ours, exact = ours_and_exact(logits, torch.tensor([[3], [4999]]), softcap=cap)
    for place in (1, 2):
        assert (ours[place] - exact[place]).abs().max() < 1e-6 * cap
    error = (ours[0].double() - exact[0]).norm() / exact[0].norm()
    assert error < 1.5 * EPS[dtype]


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
def test_a_capped_row_of_infinities_or_with_a_nan(where, dtype):
    device(where)
    logits = torch.randn(5, 4100).to(dtype)
    logits[0, 900], logits[1, 3], logits[2, 4099], logits[3] = (
        NAN,
        float("inf"),
        -float("inf"),
        -float("inf"),
    )
    same(*ours_and_exact(logits, torch.tensor([[7]] * 5), softcap=30.0))


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
def test_the_prediction_of_a_capped_row_is_its_largest_logit(where, dtype):
    """Also beyond nine caps, where float64 alone tells the capped logits apart; of equal ones the
    first."""
    device(where)
    logits = torch.randn(3, 5000).to(dtype)
    logits[0, [40, 2048, 4990]] = torch.tensor([48.0, 50.0, 49.0]).to(dtype)
    logits[1, [77, 3000, 4999]] = 64
    logits[2], logits[2, 4321] = -60, -50
    ours, exact = ours_and_exact(logits, torch.tensor([[40], [3000], [0]]), softcap=4.0)
    assert ours[3].tolist() == exact[3].tolist() == [2048, 77, 4321]


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("offset", [1e4, -1e4, 3e5, -3e5])
def test_a_far_offset_costs_no_digit(offset, scale, where):
    """Of the exponent, whose rounded offset a correction makes up for; entropy takes the general
    kernel."""
    device(where)
    logits = (torch.randn(3, 3000) * 8).round() / 8  # exact beside the offset in float32
    labels = torch.tensor([[1], [2000], [2999]])
    for options in ({}, {"entropy": True}, {"smoothing": 0.1}):
        same_row, _ = ours_and_exact(logits.clone(), labels, scale=scale, **options)
        ours, exact = ours_and_exact(logits + offset, labels, scale=scale, partials=True, **options)
        assert (ours[1][0] - exact[1][0]).abs().max() < 1e-5
        assert (ours[4][1] / exact[4][1] - 1).abs().max() < 3e-6
        assert (ours[0] - same_row[0]).abs().max() < 2e-6


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("size", [1e7, 1.4e9, 1.6e9, 1e12, 2e38, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_near_the_end_of_their_range(dtype, size, where):
    """One column is ahead of all others, or shares the lead; below it nothing is left."""
    device(where)
    values = torch.linspace(-1, 0.9, wide_or_not(3000, dtype)).to(dtype) * size
    logits = torch.stack([values, values, -values.abs() - size / 16])
    logits[0, 5] = logits[1, 5] = logits[1, 2900] = size
    ours, exact = ours_and_exact(logits, torch.tensor([[5], [2900], [7]]))
    assert ours[0].isfinite().all() and ours[1].isfinite().all()
    same(ours, exact)


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_blocks_and_warps_that_hold_nothing_but_minus_infinity(dtype, smoothing, where):
    device(where)
    columns = wide_or_not(4100, dtype)
    logits = torch.full((3, columns), -float("inf")).to(dtype)
    logits[0, 7], logits[1, columns - 1], logits[2, columns // 2 :] = 2, -3, 1
    same(*ours_and_exact(logits, torch.tensor([[7], [7], [columns - 1]]), smoothing=smoothing))


@pytest.mark.parametrize("where", DEVICES)
def test_weights_that_cancel_and_targets_in_every_block(where):
    device(where)
    logits, labels = torch.randn(3, 4100), torch.arange(0, 4100, 41)[None].repeat(3, 1)
    weight = torch.rand(3, 100)
    weight[1] = torch.tensor([1.0, -1.0]).repeat(50)
    logits[2, labels[2, 3]], weight[2, 3] = -float("inf"), 0
    same(*ours_and_exact(logits, labels, target_weight=weight))
