"""The CUDA kernels before and after the chunks of a token loss, compiled by g++ and run thread by
thread."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cuda_source.build_for_cpu import ORDERS, choose, simt
from tests.kernels.labelled_cases import (
    CLOSE,
    cases,
    check_finished,
    check_long_sums,
    check_predictions,
    check_prepared,
    in_place,
)

pytestmark = pytest.mark.gpu_source

EVERY_ORDER = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture(scope="module")
def run():
    simt()
    return in_place(torch.ops.nitp_simt)


@settings(max_examples=60)
@given(case=cases(), order=st.sampled_from(list(ORDERS)))
def test_rows_are_prepared_as_their_labels_say(run, case, order):
    choose(order)
    check_prepared(run, case, reads=False)


@pytest.mark.parametrize("rows", [256, 257, 8192, 9001])
@settings(max_examples=4)
@given(data=st.data())
def test_more_rows_than_a_block_takes_at_once(run, rows, data):
    choose(data.draw(st.sampled_from(list(ORDERS))))
    check_prepared(run, data.draw(cases((rows,))), reads=False)


@EVERY_ORDER
@pytest.mark.parametrize("dtype", CLOSE)
def test_a_loss_is_the_sum_of_what_has_a_weight(run, dtype, order):
    choose(order)
    for rows in (0, 1, 33, 1025, 8193):
        check_finished(run, dtype, rows)


def test_a_long_sum_keeps_its_digits(run):
    choose("shuffled")
    check_long_sums(run, 100_003)


def test_the_order_of_threads_changes_no_bit(run):
    torch.manual_seed(0)
    stats, scale, labels = (
        torch.randn(2, 9001),
        torch.rand(9001),
        torch.zeros(9001, 1, dtype=torch.int64),
    )
    found = []
    for order in ORDERS:
        choose(order)
        loss = run("finish_rows_", stats, scale, torch.zeros(()).double())[2]
        given = (
            labels,
            scale.view(-1, 1),
            None,
            None,
            torch.zeros(9001),
            torch.zeros(5).long(),
            stats.clone(),
        )
        left = torch.zeros(9001, 1), torch.zeros(9001).long()
        found.append(
            (loss, run("prepare_rows_", *given, *left, -100, False, 1, True, False, -1)[4])
        )
    for loss, scale in found[1:]:
        assert torch.equal(loss, found[0][0]) and torch.equal(scale, found[0][1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_row_without_a_target_predicts_nothing(run, dtype):
    choose("backward")
    check_predictions(run, dtype)
