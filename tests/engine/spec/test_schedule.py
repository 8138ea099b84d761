"""Scheduled weights at the steps where something changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nitp_ops.objectives import NITP, NTP, Piecewise, Ramp, build, parse, schedule
from tests.support.objectives_cases import INFO, make_batch


def values(weight: Ramp | Piecewise, *steps: int) -> list[float]:
    return [weight.at(step).item() for step in steps]


def test_a_linear_ramp_starts_at_zero_and_ends_at_its_weight():
    assert values(schedule(to=0.8, begin=10, warmup=4), 0, 10, 11, 12, 14, 15) == pytest.approx(
        [0, 0, 0.2, 0.4, 0.8, 0.8], abs=1e-15
    )


def test_a_ramp_is_exact_at_both_ends():
    for shape in ("linear", "cosine", "step"):
        assert values(schedule(to=0.3, begin=5, warmup=7, shape=shape), 5, 12, 999) == [0, 0.3, 0.3]


def test_a_cosine_ramp_is_half_way_in_the_middle_and_flat_at_the_ends():
    middle, early = values(schedule(to=2.0, warmup=100, shape="cosine"), 50, 1)
    assert middle == pytest.approx(1.0) and early < 0.001


def test_a_step_waits_for_the_end_of_the_warmup():
    assert values(schedule(to=1.0, begin=3, warmup=2, shape="step"), 4, 5) == [0, 1]


def test_without_warmup_the_weight_jumps_at_the_first_step():
    assert values(schedule(to=0.8, begin=1000), 999, 1000) == [0, 0.8]
    assert values(schedule(to=0.8), 0) == [0.8]


def test_a_piecewise_weight_changes_exactly_at_its_steps():
    assert values(schedule([[0, 0.3], [200000, 0.1]]), 0, 199999, 200000, 10**9) == [
        0.3,
        0.3,
        0.1,
        0.1,
    ]
    assert values(schedule([[100, 0.5]]), 99, 100) == [0, 0.5]


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({}, "expected exactly one of them"),
        ({"to": -1}, "to is -1, expected a number >= 0"),
        ({"to": 1, "begin": -1}, "begin is -1"),
        ({"to": 1, "warmup": 1.5}, "warmup is 1.5, expected an integer"),
        ({"to": 1, "shape": "lineal"}, 'shape is "lineal".*Did you mean "linear"'),
        ([], r"points has steps \[\]"),
        ([[5, 0.1], [5, 0.2]], r"points has steps \[5, 5\]"),
        ([[0, -0.1]], r"points holds \[0, -0.1\]"),
        ([[0.5, 0.1]], r"points holds \[0.5, 0.1\]"),
        ([3], "points holds 3"),
    ],
    ids=str,
)
def test_a_wrong_schedule_is_refused_with_its_reason(weight: object, message: str):
    with pytest.raises(ValueError, match=message):
        NTP(weight=weight)  # type: ignore[arg-type]


def test_all_that_is_wrong_with_a_schedule_comes_in_one_message():
    with pytest.raises(
        ValueError,
        match=r"^schedule: to is -1, .*; begin is 0.5, .*; shape is \"foo\", expected "
        r"one of",
    ):
        schedule(to=-1, begin=0.5, shape="foo")  # type: ignore[arg-type]


def test_a_schedule_comes_from_keywords_or_points_but_not_from_both():
    with pytest.raises(ValueError, match="expected exactly one"):
        schedule([[0, 1]], to=1)


def test_a_scheduled_weight_without_a_step_is_refused():
    objective = build("ntp + schedule(to=1, warmup=10)*nitp", model=INFO)
    with pytest.raises(
        ValueError,
        match=r"step is None, expected an integer \(scheduled weights: "
        r"nitp\)",
    ):
        objective(make_batch().streams())
    with pytest.raises(ValueError, match="step is -1, expected an integer >= 0"):
        objective(make_batch().streams(), step=-1)
    with pytest.raises(ValueError, match="step is True"):
        objective(make_batch().streams(), step=True)


@settings(deadline=None, max_examples=20)
@given(step=st.integers(0, 30))
def test_a_scheduled_objective_equals_the_constant_weight_of_that_step(step: int):
    batch = make_batch()
    ramp = schedule(to=0.8, begin=5, warmup=20)
    scheduled = build([NTP(), NITP(weight=ramp)], model=INFO)
    constant = build([NTP(), NITP(weight=ramp.at(step).item())], model=INFO)
    expected = constant(batch.streams()).loss
    for now in (step, torch.tensor(step)):
        torch.testing.assert_close(
            scheduled(batch.streams(), step=now).loss, expected, rtol=1e-14, atol=0
        )


def test_a_schedule_keeps_its_form_in_the_spec():
    spec = parse("schedule(to=0.8, warmup=1000)*ntp")
    assert spec.to_dict()["ntp"]["weight"] == {
        "to": 0.8,
        "begin": 0,
        "warmup": 1000,
        "shape": "linear",
    }
    assert parse("[[0, 0.3], [200, 0.1]]*ntp").to_dict()["ntp"]["weight"] == [[0, 0.3], [200, 0.1]]
