"""The Triton rows of SwiGLU, alignment and the float32 sum give what the compiled CPU rows give."""

from importlib import util
from typing import Any

import pytest
import torch

from tests.support.interpreter import COLUMNS, FLOATS, apart, equal, interpreted, native

pytestmark = pytest.mark.gpu_source

if util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

NAN, INFINITY = float("nan"), float("inf")
DTYPES = pytest.mark.parametrize("dtype", FLOATS)
WIDTHS = pytest.mark.parametrize("columns", COLUMNS)
COSINE, MSE, SMOOTH_L1, KL = range(4)
DISTANCES = pytest.mark.parametrize("distance", [COSINE, MSE, SMOOTH_L1, KL])


def normal(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return apart(torch.randn(rows, columns, dtype=torch.float64).to(dtype))


def alignment(prediction, target, target_rows=None, row_scale=None, d_prediction=None, d_target=None, *,
              distance=COSINE, eps=1e-6, gradient=True) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """(stats, d_prediction, d_target) of the Triton rows, once they agree with the CPU's."""
    wide = torch.float64 in (prediction.dtype, target.dtype)
    stats = torch.full((4, len(prediction)), NAN, dtype=torch.float64 if wide else torch.float32)
    given: list[Any] = [prediction, target, target_rows, row_scale, stats, d_prediction, d_target]
    ours = equal("alignment_rows_", *given, distance, eps, gradient)
    return ours[4], ours[0] if d_prediction is None else ours[5], ours[6]


@DTYPES
@WIDTHS
def test_swiglu_and_its_gradient_at_every_width_and_dtype(dtype, columns):
    gate, up, upstream = (normal(2, columns, dtype) for _ in range(3))
    equal("swiglu_rows", gate, up, torch.zeros(2, columns, dtype=dtype))
    equal("swiglu_rows_backward_", gate, up, upstream)
    equal(
        "swiglu_rows_backward_",
        gate,
        up,
        upstream,
        *(apart(torch.zeros(2, columns, dtype=dtype)) for _ in range(2)),
    )


def test_swiglu_far_out_neither_overflows_nor_loses_nan():
    gate = torch.tensor([[-1e4, 1e4, -90.0, 90.0, INFINITY, NAN, 0.0, -INFINITY]])
    equal("swiglu_rows", gate, torch.ones(1, 8), torch.zeros(1, 8))
    out = interpreted("swiglu_rows", gate, torch.ones(1, 8), torch.zeros(1, 8))[2]
    assert out[0, :2].tolist() == [0.0, 1e4] and out[0, 5].isnan()
    equal("swiglu_rows_backward_", gate[:, :4].contiguous(), torch.ones(1, 4), torch.ones(1, 4))


@WIDTHS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [None, 0.37, 0.0])
def test_a_sum_takes_addends_of_its_dtype_and_narrower_ones(columns, dtype, factor):
    work = torch.float64 if dtype == torch.float64 else torch.float32
    addend, by = (
        normal(3, columns, dtype),
        None if factor is None else torch.tensor(factor, dtype=work),
    )
    if factor == 0:
        addend[0, -1] = NAN
    equal("accumulate_rows_", normal(3, columns, work), addend, by)


def test_the_sum_of_a_dtype_takes_no_other_addend():
    half = interpreted("accumulate_rows_", torch.ones(1, 2), torch.full((1, 2), 0.5).half())
    assert half[0].tolist() == [[1.5, 1.5]]
    with pytest.raises(
        TypeError, match="addend is float64, expected bfloat16 or float16 or float32"
    ):
        interpreted("accumulate_rows_", torch.zeros(1, 2), torch.zeros(1, 2).double())
    with pytest.raises(TypeError, match="out is bfloat16, expected float32 or float16"):
        interpreted(
            "scale_rows_", torch.zeros(1, 2), torch.tensor(1.0), torch.zeros(1, 2).bfloat16()
        )


@WIDTHS
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("factor", [0.37, 1.0, 0.0])
def test_rows_are_scaled_by_a_number_of_the_device(columns, dtype, factor):
    values = normal(3, columns, dtype)
    values[0, -1] = NAN
    work = torch.float64 if dtype == torch.float64 else torch.float32
    equal("scale_rows_", apart(values), torch.tensor(factor, dtype=work))
    for narrow in {dtype, torch.float16} if dtype == torch.float32 else {dtype}:
        equal(
            "scale_rows_",
            values,
            torch.tensor(factor, dtype=work),
            apart(torch.ones_like(values, dtype=narrow)),
        )


@DISTANCES
@WIDTHS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_distance_at_every_width(dtype, columns, distance):
    target = normal(3, columns, dtype)
    # row 0 far from its partner, 1 and 2 near
    prediction = apart((2 * target + normal(3, columns, dtype)).to(dtype))
    prediction[0] *= -1
    scale = torch.tensor(
        [0.3, -2.0, 0.0], dtype=torch.float64 if dtype == torch.float64 else torch.float32
    )
    alignment(
        prediction,
        target,
        None,
        scale,
        None,
        apart(torch.zeros(3, columns).to(dtype)),
        distance=distance,
    )


@DISTANCES
@DTYPES
@pytest.mark.parametrize("of_target", FLOATS)
def test_every_pair_of_dtypes(dtype, of_target, distance):
    prediction, target = normal(2, 33, dtype), normal(2, 33, of_target)
    into = torch.full((2, 33), NAN, dtype=dtype), torch.full((2, 33), NAN, dtype=of_target)
    alignment(prediction, target, None, None, *into, distance=distance)


@DISTANCES
def test_the_target_is_read_by_row_index_and_a_row_that_does_not_exist_poisons_its_pair(distance):
    prediction, target = normal(5, 40, torch.float32), normal(3, 40, torch.float32)
    alignment(
        prediction,
        target,
        torch.tensor([2, 0, 2, 1, 1]),
        d_target=torch.zeros(5, 40),
        distance=distance,
    )
    stats = torch.zeros(4, 5)
    for row in (3, 2**40, -1):
        given = (
            prediction,
            target,
            torch.tensor([0, row, 1, 2, 0]),
            None,
            stats,
            None,
            None,
            distance,
            1e-6,
            True,
        )
        gradient, _, _, _, values, *_ = interpreted("alignment_rows_", *given)
        assert values[0, 1].isnan() and gradient[1].isnan().all()
        assert values[:, [0, 2, 3, 4]].isfinite().all() and gradient[[0, 2, 3, 4]].isfinite().all()


def test_a_cosine_near_one_keeps_its_digits():
    target = torch.randn(2, 4096)
    prediction = 3 * target + 1e-3 * torch.randn(2, 4096)
    loss = alignment(prediction, target)[0][0].double()
    p, z = prediction.double(), target.double()
    # of 5e-8
    torch.testing.assert_close(loss, 1 - torch.cosine_similarity(p, z), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(("size", "eps"), [(100, 1e-6), (-80, 1e-37)])
@pytest.mark.parametrize("side", ["prediction", "target", "both"])
def test_a_row_whose_squares_overflow_or_vanish_has_the_cosine_of_any_other(side, size, eps):
    prediction, target = torch.randn(3, 50), torch.randn(3, 50)
    target[0] += 4 * prediction[0]
    expected = native("alignment_rows_", prediction, target, None, None, torch.zeros(4, 3), torch.zeros(3, 50),
                      torch.zeros(3, 50), 0, eps, True)  # fmt: skip
    by_p, by_z = (2.0**size if side in (name, "both") else 1.0 for name in ("prediction", "target"))
    _, _, _, _, stats, of_prediction, of_target, *_ = interpreted(
        "alignment_rows_", by_p * prediction, by_z * target, None, None, torch.zeros(4, 3), torch.zeros(3, 50),
        torch.zeros(3, 50), 0, eps, True)  # fmt: skip
    found = stats[:2], stats[2] / by_p, stats[3] / by_z, by_p * of_prediction, by_z * of_target
    values, dp, dz = expected[4:7]
    for a, b in zip(found, (values[:2], values[2], values[3], dp, dz), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_kl_of_logits_as_far_apart_as_float32_goes():
    prediction = torch.tensor([[3e38, -3e38, 1.0], [1.0, 2.0, 3.0]])
    target = torch.tensor([[2.0, -3e38, -3e38], [3e38, 0.0, -3e38]])
    stats, *gradients = alignment(
        prediction, target, None, None, torch.ones(2, 3), torch.ones(2, 3), distance=3
    )
    assert stats[0].isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("small", ["prediction", "target", "both"])
def test_a_side_below_eps_gets_no_gradient(small):
    prediction, target = torch.randn(2, 50), torch.randn(2, 50)
    if small != "target":
        prediction[0] *= 1e-6
    if small != "prediction":
        target[0] *= 1e-6
    _, of_prediction, of_target = alignment(
        prediction, target, d_target=torch.ones(2, 50), eps=1e-2
    )
    assert (of_prediction[0] == 0).all() == (small != "target")
    assert (of_target[0] == 0).all() == (small != "prediction")


@DISTANCES
def test_nan_and_infinity_spoil_their_own_row_and_nothing_under_a_zero_scale(distance):
    prediction, target = torch.randn(5, 60), torch.randn(5, 60)
    prediction[0, 3], prediction[1, 4], target[2, 5], prediction[3, 6] = NAN, INFINITY, NAN, NAN
    scale = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])
    stats, gradient, _ = alignment(
        prediction, target, None, scale, d_target=torch.ones(5, 60), distance=distance
    )
    assert (gradient[3] == 0).all() and stats[0, 3].isnan() and gradient[4].isfinite().all()


@DISTANCES
def test_without_gradient_the_inputs_stay(distance):
    prediction, target = torch.randn(2, 50), torch.randn(2, 50)
    assert torch.equal(
        alignment(prediction, target, distance=distance, gradient=False)[1], prediction
    )


def test_empty_rows_and_wrong_arguments():
    assert alignment(torch.zeros(0, 4), torch.zeros(0, 4))[0].shape == (4, 0)
    equal("swiglu_rows", torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, 4))
    equal("swiglu_rows", torch.zeros(4, 0), torch.zeros(4, 0), torch.zeros(4, 0))
    wrong = torch.zeros(2, 3), torch.zeros(2, 3).double(), torch.zeros(2, 3)
    with pytest.raises(TypeError, match="swiglu_rows: up is float64, expected float32"):
        interpreted("swiglu_rows", *wrong)
    with pytest.raises(
        ValueError,
        match=r"swiglu_rows: gate has strides .* expected a dense last "
        r"axis",
    ):
        interpreted("swiglu_rows", *(torch.zeros(3, 2).t() for _ in range(3)))
    with pytest.raises(
        ValueError,
        match=r"swiglu_rows: gate has shape \(3,\), expected \(rows, "
        r"columns\)",
    ):
        interpreted("swiglu_rows", *(torch.zeros(3) for _ in range(3)))
    given = torch.zeros(2, 3), torch.zeros(2, 3), None, None, torch.zeros(4, 2), None, None
    with pytest.raises(ValueError, match="distance is 4, expected 0, 1, 2 or 3"):
        interpreted("alignment_rows_", *given, 4, 1e-6, True)
