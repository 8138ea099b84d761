"""What stands before the chunks of a token loss and after them, by every instruction set and by torch operations."""

import pytest
import torch
from hypothesis import given
from labelled_cases import (
    CLOSE,
    cases,
    check_finished,
    check_long_sums,
    check_predictions,
    check_prepared,
    in_place,
)
from processor import parameters

from nitp_ops import rows
from nitp_ops.core import library

NATIVE = "portable", "avx2", "avx512", "avx512_bf16"
NEEDS_LIBRARY = pytest.mark.skipif(rows.missing is not None, reason="no compiled library")


@pytest.fixture(params=["torch", *(pytest.param(*each.values, marks=[*each.marks, NEEDS_LIBRARY])
                                   for each in parameters(NATIVE))], scope="module")  # fmt: skip
def run(request):
    """The row kernels of one backend, or of one instruction set."""
    if request.param == "torch":
        yield in_place(rows.kernels("torch"))
        return
    best = library.instruction_set()
    library.choose_instruction_set(request.param)
    yield in_place(torch.ops.nitp_ops)
    library.choose_instruction_set(best)


@given(case=cases())
def test_rows_are_prepared_as_their_labels_say(run, case):
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
