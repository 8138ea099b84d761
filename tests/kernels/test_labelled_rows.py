"""What stands before the chunks of a token loss and after them, by every instruction set and by
torch operations."""

import pytest
import torch
from hypothesis import given

from nitp_ops.core import library
from nitp_ops.kernels import select
from tests.kernels.labelled_cases import (
    CLOSE,
    Case,
    cases,
    check_finished,
    check_long_sums,
    check_predictions,
    check_prepared,
    in_place,
)
from tests.support.processor import parameters

NATIVE = "portable", "avx2", "avx512", "avx512_bf16"
NEEDS_LIBRARY = pytest.mark.skipif(select.load_error is not None, reason="no compiled library")


@pytest.fixture(params=["torch", *(pytest.param(*each.values, marks=[*each.marks, NEEDS_LIBRARY])
                                   for each in parameters(NATIVE))], scope="module")  # fmt: skip
def run(request):
    """The row kernels of one backend, or of one instruction set."""
    if request.param == "torch":
        yield in_place(select.row_kernels("torch"))
        return
    best = library.instruction_set()
    library.choose_instruction_set(request.param)
    yield in_place(torch.ops.nitp_ops)
    library.choose_instruction_set(best)


@given(case=cases())
def test_rows_are_prepared_as_their_labels_say(run, case):
    check_prepared(run, case)


def test_an_ignored_row_keeps_weight_zero_when_the_sum_of_class_weights_is_nan(run):
    case = Case(
        labels=torch.tensor([[4], [-100], [0]]),
        target_weight=torch.tensor([[1.0], [1.0], [float("nan")]]),
        row_weight=None,
        normalizer=None,
        ignore_index=-100,
        negative_is_absent=False,
        mean=True,
        needs_target_weight=False,
        max_rows=-1,
        fields=2,
        dtype=torch.float32,
    )
    check_prepared(run, case)


@pytest.mark.parametrize("rows_", [0, 1, 129, 5000])
@pytest.mark.parametrize("dtype", CLOSE)
def test_a_loss_is_the_sum_of_what_has_a_weight(run, dtype, rows_):
    check_finished(run, dtype, rows_)


def test_a_long_sum_keeps_its_digits(run):
    check_long_sums(run, 100_003)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_row_without_a_target_predicts_nothing(run, dtype):
    check_predictions(run, dtype)
