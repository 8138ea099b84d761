"""Rows of logits that a cluster of blocks takes together, run thread by thread on the CPU, equal
the CPU kernel's.

A device of 128 threads in a block and next to no shared memory needs clusters for short rows.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cuda_source.build_for_cpu import (
    H200_SHARED,
    ORDERS,
    choose,
    last_cluster,
    placed,
    untouched,
)
from tests.kernels.cuda_source.test_operators import (
    DTYPES,
    NAN,
    case,
    cross_entropy,
    ours_and_exact,
    same,
)

pytestmark = pytest.mark.gpu_source


def small(order="forward", cluster=8, shared_bytes=0):
    choose(order, shared_bytes, cluster, threads=128)


def plain(logits, **options):
    return cross_entropy(
        logits, torch.zeros(len(logits), 1).long(), kernels=torch.ops.nitp_simt, **options
    )


@settings(max_examples=100)
@given(case([700, 2049, 4100, 8200]), st.sampled_from([2, 4, 8]), st.sampled_from([0, 8192]))
def test_every_option_dtype_stride_and_address_by_every_cluster(case, cluster, shared_bytes):
    logits, labels, options, place = case
    small("forward", cluster, shared_bytes)
    rows = placed(logits, *place)
    ours, exact = ours_and_exact(rows, labels, **options)
    same(ours, exact)
    assert untouched(rows)
    for order in ("backward", "shuffled"):  # bit for bit, in whatever order threads and blocks run
        small(order, cluster, shared_bytes)
        again = cross_entropy(
            placed(logits, *place), labels, kernels=torch.ops.nitp_simt, **options
        )
        for a, b in zip(ours, again, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cluster", [2, 4, 8])
def test_plain_rows_by_every_cluster_in_every_order(dtype, cluster, order):
    in_registers = 256 if dtype == torch.float64 else 4 * 128 * 16 // dtype.itemsize
    columns = cluster * in_registers - 5
    small(order, cluster)
    logits, labels = (
        torch.randn(2, columns).to(dtype),
        torch.tensor([[columns - 1, 0, columns // 2], [7, -100, 7]]),
    )
    same(
        *ours_and_exact(
            placed(logits, 3, columns + 3), labels, smoothing=0.1, z_loss=0.01, partials=True
        )
    )
    assert last_cluster() == cluster


@pytest.mark.parametrize(
    ("columns", "largest", "blocks"),
    [
        *[(2051, 8, 1), (2052, 8, 2), (4096, 8, 2), (4100, 8, 4), (8196, 8, 8)],
        # not held: the largest there is
        *[(16388, 8, 8), (16388, 4, 4), (16388, 1, 1), (4100, 2, 2), (4100, 7, 4)],
    ],
)
def test_the_smallest_cluster_that_holds_the_row(columns, largest, blocks):
    small(cluster=largest)
    same(*ours_and_exact(torch.randn(1, columns), torch.tensor([[9]])))
    assert last_cluster() == blocks


@pytest.mark.parametrize(
    ("dtype", "columns", "softcap", "blocks"),
    [
        *[(torch.bfloat16, columns, 0.0, 1) for columns in (32000, 50304)],
        (torch.bfloat16, 80000, 0.0, 2),
        *[(torch.bfloat16, columns, 0.0, 4) for columns in (128256, 151936)],
        *[(torch.bfloat16, columns, 0.0, 8) for columns in (202048, 262144)],
        *[
            (torch.float32, 32000, 0.0, 1),
            (torch.float32, 50304, 0.0, 4),
            (torch.float32, 151936, 0.0, 8),
        ],
        *[
            (torch.bfloat16, 50304, 30.0, 1),
            (torch.bfloat16, 128256, 30.0, 4),
            (torch.bfloat16, 256000, 30.0, 8),
        ],
        (torch.float32, 128256, 30.0, 8),
    ],
)
def test_heads_on_a_device_of_227_kb(dtype, columns, softcap, blocks):
    choose("forward", H200_SHARED, 8)
    logits, labels = torch.randn(1, columns).to(dtype), torch.tensor([[columns - 1]])
    same(*ours_and_exact(logits, labels, softcap=softcap))
    assert last_cluster() == blocks


def test_the_prediction_is_the_first_of_equal_maxima_in_whichever_block():
    logits = torch.zeros(6, 8200)
    for row, first in enumerate((0, 511, 513, 1027, 4099, 8199)):
        logits[row, first:] = torch.where(torch.arange(first, 8200) % 7 == first % 7, 1.0, 0.5)
    for order in ORDERS:
        small(order)
        *_, prediction = plain(placed(logits, 1, 8203))
        assert prediction.tolist() == [0, 511, 513, 1027, 4099, 8199] and last_cluster() == 8


@pytest.mark.parametrize("options", [{}, {"entropy": True}])
def test_a_nan_or_an_infinity_in_one_block_spoils_its_own_row_only(options):
    small()
    logits = torch.randn(5, 4100)
    logits[0, 900], logits[1, 3], logits[2, 4099], logits[3] = (
        NAN,
        float("inf"),
        -float("inf"),
        -float("inf"),
    )
    same(*ours_and_exact(logits, torch.tensor([[7]] * 5), **options))


def test_ignored_rows_labels_outside_and_a_weight_of_zero_reach_every_block():
    small()
    scale = torch.tensor([1.0, 1.0, 0.0, 1.0])
    logits = torch.randn(4, 4100)
    logits[2] = NAN
    ours, exact = ours_and_exact(
        logits, torch.tensor([[-100], [4100], [5], [4099]]), row_scale=scale
    )
    same(ours, exact)
    assert not ours[0][0].any() and ours[0][1].isnan().all() and not ours[0][2].any()


@pytest.mark.parametrize("gradient", [True, False])
def test_rows_without_targets(gradient):
    small()
    same(*ours_and_exact(torch.randn(2, 4100), torch.zeros(2, 0).long(), gradient=gradient))


def test_the_emulated_device_has_no_cluster_unless_asked():
    choose("forward", 0, threads=128)
    plain(torch.randn(1, 4100))
    assert last_cluster() == 1
