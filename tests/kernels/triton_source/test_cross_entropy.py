"""The Triton cross-entropy rows give what the compiled CPU rows give."""

import math
from importlib import util
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.interpreter import COLUMNS, FLOATS, apart, equal, interpreted

pytestmark = pytest.mark.gpu_source

if util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

OP, NAN = "cross_entropy_rows_", float("nan")
DTYPES = pytest.mark.parametrize("dtype", FLOATS)


def work(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def arguments(logits, labels, *, target_weight=None, bias=None, class_weight=None, row_scale=None, ignore_index=-100,
              negative_is_absent=False, label_smoothing=0.0, z_loss=0.0, softcap=0.0, logit_scale=1.0, gradient=True,
              entropy=False) -> list[Any]:  # fmt: skip
    """Those of one call, with outputs that hold NaN where nothing is written."""
    rows, dtype = len(logits), work(logits.dtype)
    labels = labels.view(rows, labels.shape[1] if labels.dim() > 1 else 1)
    stats = torch.full((3 if entropy else 2, rows), NAN, dtype=dtype)
    target_logit, prediction = torch.full(labels.shape, 5.0, dtype=dtype), torch.full((rows,), -7)
    return [logits, labels, target_weight, bias, class_weight, row_scale, stats, target_logit, prediction, ignore_index,
            negative_is_absent, label_smoothing, z_loss, softcap, logit_scale, gradient]  # fmt: skip


def checked(logits, labels, **options) -> tuple[torch.Tensor, ...]:
    """(logits, stats, target_logit, prediction) of the Triton rows, once they agree with the CPU's."""
    ours = equal(OP, *arguments(logits, labels, **options))
    return ours[0], ours[6], ours[7], ours[8]


def choices(columns: int, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    wide = work(dtype)
    bias, by_class = torch.randn(columns, dtype=wide), torch.rand(columns, dtype=wide)
    scale, weight = torch.tensor([0.3, 1.0, 0.0], dtype=wide), torch.rand(3, 4, dtype=wide)
    smoothed = {"label_smoothing": 0.1, "z_loss": 0.01}
    return {
        "plain": {},
        "everything": {
            "bias": bias, "row_scale": scale, "softcap": 3.0, "logit_scale": 0.7, "entropy": True, **smoothed
        },
        "by class": {"class_weight": by_class, "target_weight": weight[:, :1].contiguous(), "label_smoothing": 0.2},
        "four targets": {"target_weight": weight, "negative_is_absent": True, "softcap": 5.0, **smoothed},
    }  # fmt: skip


@DTYPES
@pytest.mark.parametrize("columns", COLUMNS)
def test_every_option_at_every_width_and_dtype(dtype, columns):
    for name, options in choices(columns, dtype).items():
        labels = torch.randint(0, columns, (3, 4 if name == "four targets" else 1))
        labels[1] = -100
        checked(apart((2 * torch.randn(3, columns)).to(dtype)), labels, **options)


@given(
    seed=st.integers(0, 2**31),
    columns=st.integers(1, 40),
    targets=st.integers(1, 5),
    negative_is_absent=st.booleans(),
    ignore_index=st.sampled_from([-100, 0, 3]),
    options=st.fixed_dictionaries(
        {
            "label_smoothing": st.sampled_from([0.0, 0.3, 1.0]),
            "z_loss": st.sampled_from([0.0, 0.1]),
            "softcap": st.sampled_from([0.0, 2.0]),
            "logit_scale": st.sampled_from([1.0, 0.3]),
            "gradient": st.booleans(),
            "entropy": st.booleans(),
        }
    ),
)
@settings(max_examples=40)
def test_any_mixture_of_targets_that_repeat_are_absent_or_lie_outside(
    seed, columns, targets, negative_is_absent, ignore_index, options
):
    torch.manual_seed(seed)
    labels = torch.randint(-2, columns + 2, (4, targets))
    weight = torch.randint(0, 3, (4, targets)).double()  # zeros too
    logits = torch.randn(4, columns, dtype=torch.float64)
    given = {
        "target_weight": weight,
        "ignore_index": ignore_index,
        "negative_is_absent": negative_is_absent,
    }
    checked(
        logits, labels, row_scale=torch.tensor([1.0, 0.0, 0.5, -2.0]).double(), **given, **options
    )


def test_repeated_targets_add():
    logits, scale = torch.randn(1, 9, dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    twice = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64)
    once = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    repeated = checked(logits, torch.tensor([[4, 2, 4]]), target_weight=twice, row_scale=scale)
    merged = checked(logits, torch.tensor([[4, 2]]), target_weight=once, row_scale=scale)
    for a, b in zip(repeated[:2], merged[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("label", [9, 4095, 2**40, -1, -(2**40)])
def test_a_label_outside_poisons_its_row_and_reads_nothing(label):
    labels = torch.tensor([[3], [label], [0]])
    gradient, stats, target_logit, _ = checked(torch.randn(3, 9), labels)
    assert gradient[1].isnan().all() and stats[0, 1].isnan() and target_logit[1].isnan()
    assert (
        stats[1].isfinite().all()
        and gradient[[0, 2]].isfinite().all()
        and stats[0, [0, 2]].isfinite().all()
    )


@pytest.mark.parametrize("columns", [5, 5003, 9001])
def test_rows_with_nan_and_infinities(columns):
    logits = torch.randn(6, columns)
    logits[0, columns // 2] = NAN
    logits[1, -1] = math.inf
    logits[2, : columns // 2] = -math.inf  # whole lanes see nothing else
    logits[3] = -math.inf
    logits[4, 0] = -math.inf  # the target
    logits[5] = NAN
    labels = torch.tensor([1, 1, columns - 1, 1, 0, 1])
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.1}, {"entropy": True}):
        checked(logits, labels, **options)


def test_a_target_of_weight_zero_adds_nothing_even_where_its_logit_is_minus_infinity():
    logits = torch.randn(1, 20)
    logits[0, 3] = -math.inf
    stats = checked(logits, torch.tensor([[3, 5]]), target_weight=torch.tensor([[0.0, 1.0]]))[1]
    assert stats[0].isfinite()


LONG = pytest.mark.parametrize("columns", [5003, 9001])  # held in registers, and read again


@LONG
@pytest.mark.parametrize("entropy", [False, True])
def test_logits_masked_with_the_least_number_have_no_probability(entropy, columns):
    logits = torch.full((2, columns), torch.finfo(torch.float32).min)
    logits[0, [1, 4999]] = torch.tensor([0.5, 1.0])
    logits[1, 4999] = -math.inf
    stats = checked(logits, torch.tensor([1, 3]), entropy=entropy)[1]
    assert stats[0, 0].item() == pytest.approx(math.log1p(math.exp(0.5)), rel=1e-6)


def test_a_nan_under_a_zero_weight_or_in_an_ignored_row_stays_out():
    logits = torch.randn(3, 300)
    logits[0, 5], logits[1, 6] = NAN, math.inf
    gradient, stats, _, _ = checked(
        logits, torch.tensor([1, -100, 2]), row_scale=torch.tensor([0.0, 1.0, 1.0])
    )
    assert (gradient[:2] == 0).all() and stats[0, 0].isnan() and stats[0, 1] == 0


@LONG
def test_the_prediction_is_the_first_of_equal_maxima(columns):
    logits = torch.zeros(4, columns)
    logits[0, [37, 4096 + 37, 4990]] = 2.0
    logits[1, [4097, 4100, 5002]] = 2.0
    logits[2] = -3.0
    logits[3, [4096 + 7, 500]] = 900.0  # the cap makes them and ...
    logits[3, 77] = 800.0  # ... this one equal
    prediction = checked(logits, torch.zeros(4, dtype=torch.int64), softcap=3.0)[3]
    assert prediction.tolist() == [37, 4097, 0, 77]


@LONG
def test_a_common_offset_costs_the_loss_nothing(columns):
    logits = torch.randint(-2048, 2048, (4, columns)) / 1024.0
    labels = torch.randint(0, columns, (4,))
    plain = interpreted(OP, *arguments(logits, labels, label_smoothing=0.1))[6]
    # exact float32 sums
    far = interpreted(OP, *arguments(logits + 10000.0, labels, label_smoothing=0.1))[6]
    torch.testing.assert_close(far[0], plain[0], rtol=3e-7, atol=0.0)


def test_a_tiny_loss_keeps_its_digits():
    logits = torch.zeros(1, 1000)
    logits[0, 3] = 25.0
    loss = checked(logits, torch.tensor([3]))[1][0].item()
    assert loss == pytest.approx(math.log1p(999 * math.exp(-25.0)), rel=1e-5)


def test_a_small_logit_keeps_its_digits_under_a_cap():
    x = torch.tensor([[1e-7, -3e-4, 0.2, 1.0, 14.0, 16.0, -40.0, 1e4]])
    for dtype in (torch.float64, torch.float32):
        for column in range(8):
            target = checked(x.to(dtype), torch.tensor([column]), softcap=30.0)[2]
            exact = 30 * math.tanh(x[0, column].item() / 30)
            assert target.item() == pytest.approx(
                exact, rel=1e-14 if dtype == torch.float64 else 4e-7
            )


def test_without_gradient_the_logits_stay():
    logits = torch.randn(3, 50)
    assert torch.equal(checked(logits, torch.tensor([1, -100, 4]), gradient=False)[0], logits)


def test_no_row_is_no_work_and_no_column_is_refused():
    none = torch.empty(0, 5), torch.empty(0, 1, dtype=torch.int64)
    assert checked(*none)[1].shape == (2, 0)
    with pytest.raises(ValueError, match=r"logits has shape \(2, 0\), expected a column at least"):
        interpreted(OP, *arguments(torch.empty(2, 0), torch.zeros(2, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"bias has shape .* expected 5 dense values"):
        interpreted(
            OP,
            *arguments(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), bias=torch.zeros(4)),
        )
    with pytest.raises(ValueError, match=r"logits has strides .* expected a dense last axis"):
        interpreted(OP, *arguments(torch.zeros(5, 2).t(), torch.zeros(2, dtype=torch.int64)))
