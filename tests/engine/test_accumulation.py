"""`Window`: what the batches of one optimizer step share, given whole or argument by argument,
never both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from nitp_ops.objectives import Counts, Window, build
from tests.support.objectives_cases import INFO, gradients, make_batch

SPEC = "ntp + schedule(to=0.5, warmup=4)*nitp"


@pytest.mark.parametrize(
    "given", [{}, {"gradient_reduction": "mean"}, {"gradient_reduction": "sum"}], ids=str
)
@pytest.mark.parametrize("counted", [False, True])
def test_a_window_is_its_arguments_given_one_by_one(counted: bool, given: dict[str, Any]):
    batch, objective = make_batch(), build(SPEC, model=INFO)
    twice = objective.count(batch.streams()) + objective.count(batch.streams())
    given = given | {"step": 3, "counts": Counts(twice, group_size=4) if counted else None}
    whole, single = (
        objective(batch.streams(), window=Window(**given)),
        objective(batch.streams(), **given),
    )
    factor = (4 if given.get("gradient_reduction") != "sum" else 1) / 2 if counted else 1
    alone = objective(batch.streams(), step=3).loss
    torch.testing.assert_close(whole.loss, factor * alone, rtol=1e-14, atol=0)
    tensors = [*batch.leaves, *objective.parameters()]
    for mine, other in zip(
        gradients(whole.loss, tensors), gradients(single.loss, tensors), strict=True
    ):
        assert torch.equal(mine, other)
    assert whole.metrics.compute() == single.metrics.compute()


@pytest.mark.parametrize("name", ["counts", "step", "gradient_reduction"])
def test_a_window_beside_its_arguments_is_refused(name: str):
    batch, objective = make_batch(), build("ntp", model=INFO)
    value = {"counts": objective.count(batch.streams()), "step": 0, "gradient_reduction": "mean"}[
        name
    ]
    with pytest.raises(
        ValueError, match=f"^objective: {name} and window are given, expected window alone"
    ):
        objective(batch.streams(), window=Window(), **{name: value})


def test_what_is_no_window_is_refused_in_the_name_of_what_was_called():
    batch, objective = make_batch(), build("ntp", model=INFO)
    counts: Any = dict(objective.count(batch.streams()))
    with pytest.raises(TypeError, match=r"^objective: window is a dict, expected a Window"):
        objective(batch.streams(), window={"step": 3})  # type: ignore[arg-type]
    for caller, make in {
        "Window": Window,
        "objective": lambda **given: objective(batch.streams(), **given),
    }.items():
        with pytest.raises(TypeError, match=f"^{caller}: counts is a dict, expected Counts"):
            make(counts=counts)
        with pytest.raises(ValueError, match=f"^{caller}: step is -1, expected an integer >= 0"):
            make(step=-1)
        with pytest.raises(
            ValueError, match=f'^{caller}: gradient_reduction is \'max\', expected "mean" or "sum"'
        ):
            make(gradient_reduction="max")
    with pytest.raises(ValueError, match=r"counts has parts \['nitp', 'ntp'\], expected \['ntp'\]"):
        both = build("ntp + nitp", model=INFO)
        objective(batch.streams(), window=Window(counts=both.count(batch.streams())))


def test_counts_that_were_not_reduced_over_the_group_are_refused():
    counts = Counts({"ntp": torch.tensor(3)})
    dist.init_process_group("fake", rank=0, world_size=4)
    try:
        group = dist.group.WORLD
        for reduced in (Counts(counts, group_size=4), Counts(counts, group_size=8)):
            assert Window(counts=reduced, group=group).loss_factor == reduced.group_size
        with pytest.raises(
            ValueError,
            match=r"^Window: counts is of 1 ranks, expected "
            r"counts.all_reduce.* of 4 ranks",
        ):
            Window(counts=counts, group=group)
        with pytest.raises(
            ValueError,
            match=r"^Window: counts is None, expected "
            r"counts.all_reduce.* of 4 ranks",
        ):
            Window(step=3, group=group)
    finally:
        dist.destroy_process_group()
