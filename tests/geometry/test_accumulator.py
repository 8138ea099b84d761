"""The accumulator: the numbers of a stream of batches are those of all rows at once."""

import json
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nitp_ops import geometry
from nitp_ops.geometry import Accumulator
from tests.geometry.test_geometry import FUNCTIONS, accumulated, gaussian, matrices, same


@settings(deadline=None, max_examples=60)
@given(matrices, st.lists(st.integers(0, 40), max_size=4))
def test_any_split_into_batches_gives_the_numbers_of_the_functions(x, cuts):
    split = accumulated(x, *sorted(cuts))
    for name, function in FUNCTIONS.items():
        tolerance = 1e-6 if name == "effective_rank_singular" else 1e-8
        assert same(split[name], function(x), tolerance), name


@settings(deadline=None, max_examples=40)
@given(matrices, st.integers(0, 40))
def test_merged_accumulators_equal_one_that_saw_everything(x, cut):
    left, right = Accumulator(x.shape[1]), Accumulator(x.shape[1], seed=1)
    left.update(x[:cut])
    right.update(x[cut:])
    total = left + right
    assert (left.count, right.count, total.count) == (len(x[:cut]), len(x[cut:]), len(x))
    whole = accumulated(x)
    for name, record in total.compute().items():
        assert same(record["value"], whole[name], 1e-8), name
    assert left.merge(right) is left
    assert left.compute() == total.compute()


def test_a_large_update_is_cut_into_blocks_and_changes_nothing(monkeypatch):
    x = gaussian(100, 6, offset=1.0)
    whole = accumulated(x)
    monkeypatch.setattr("nitp_ops.geometry.streaming._BLOCK_ELEMENTS", 6 * 7)
    for name, value in accumulated(x).items():
        assert same(value, whole[name]), name


def test_a_huge_offset_does_not_cancel_the_streamed_covariance():
    x = gaussian(200, 4)
    shifted = accumulated(x + 1e7, 50, 120)
    assert same(shifted["effective_rank"], geometry.effective_rank(x), 1e-6)


def test_the_sample_is_bounded_and_does_not_depend_on_the_split():
    x = gaussian(500, 4)
    whole, parts = Accumulator(4, max_rows=50), Accumulator(4, max_rows=50)
    whole.update(x)
    for row in x.split(7):
        parts.update(row)
    record = parts.compute()["uniformity"]
    assert record["value"] == whole.compute()["uniformity"]["value"]
    assert "50 sampled rows" in record["definition"]
    assert abs(record["value"] - geometry.uniformity(x, max_rows=500)) < 0.2
    assert record["value"] != geometry.uniformity(x, max_rows=500)


def test_the_sample_takes_early_and_late_rows_alike():
    x = torch.cat(
        [torch.tensor([[1.0, 0.0]]).repeat(1000, 1), torch.tensor([[-1.0, 0.0]]).repeat(1000, 1)]
    )
    # Half of the pairs are equal (exponent 0) and half opposite (exponent -8).
    assert abs(geometry.uniformity(x, max_rows=400) - math.log(0.5)) < 0.05


def test_sampling_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    geometry.uniformity(gaussian(100, 3), max_rows=10)
    assert torch.equal(before, torch.get_rng_state())


def test_a_sum_takes_more_rows_as_its_left_part_would():
    x = gaussian(60, 3)
    left, empty = Accumulator(3, max_rows=8), Accumulator(3, max_rows=8)
    left.update(x)
    total = left + empty
    for accumulator in (left, total):
        accumulator.update(x)
    assert left.compute() == total.compute()


def test_every_number_carries_its_definition_and_survives_json():
    accumulator = Accumulator(3, source="hidden_states[5], before the final norm")
    accumulator.update(gaussian(10, 3))
    records = accumulator.compute()
    assert set(records) == set(FUNCTIONS)
    for record in records.values():
        assert set(record) == {"value", "definition", "centring", "n", "d", "source"}
        assert (record["n"], record["d"]) == (10, 3)
        assert record["source"] == "hidden_states[5], before the final norm"
    assert records["effective_rank"]["centring"] == "mean"
    assert records["effective_rank_singular"]["centring"] == "none"
    assert json.loads(json.dumps(records)) == records
