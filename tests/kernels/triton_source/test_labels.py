"""The Triton kernels before and after the chunks of a token loss, interpreted on the CPU."""

from importlib import util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.labelled_cases import (
    CLOSE,
    cases,
    check_finished,
    check_long_sums,
    check_predictions,
    check_prepared,
)
from tests.support.interpreter import interpreted

pytestmark = pytest.mark.gpu_source

if util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)


@settings(max_examples=40)
@given(case=cases())
def test_rows_are_prepared_as_their_labels_say(case):
    check_prepared(interpreted, case, reads=False)


@pytest.mark.parametrize("rows", [256, 257, 9001])
@settings(max_examples=4)
@given(data=st.data())
def test_more_rows_than_a_block_takes_at_once(rows, data):
    check_prepared(interpreted, data.draw(cases((rows,))), reads=False)


@pytest.mark.parametrize("rows", [0, 1, 33, 4097])
@pytest.mark.parametrize("dtype", CLOSE)
def test_a_loss_is_the_sum_of_what_has_a_weight(dtype, rows):
    check_finished(interpreted, dtype, rows)


def test_a_long_sum_keeps_its_digits():
    check_long_sums(interpreted, 100_003)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_row_without_a_target_predicts_nothing(dtype):
    check_predictions(interpreted, dtype)


def test_what_does_not_fit_together_is_refused():
    stats, one = torch.zeros(2, 3), torch.zeros((), dtype=torch.float64)
    with pytest.raises(
        ValueError,
        match=r"^finish_rows_: scale has shape \(2,\).*, expected 3 "
        r"dense values",
    ):
        interpreted("finish_rows_", stats, torch.zeros(2), one)
    left = torch.zeros(3), torch.zeros(5).long(), stats, torch.zeros(3, 1), torch.zeros(3).long()
    with pytest.raises(
        ValueError,
        match=r"^prepare_rows_: labels has shape \(3,\), expected "
        r"\(rows, targets\)",
    ):
        interpreted(
            "prepare_rows_",
            torch.zeros(3).long(),
            None,
            None,
            None,
            *left,
            0,
            False,
            3,
            True,
            False,
            -1,
        )
