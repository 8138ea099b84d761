"""Calls of prepare_rows_ and finish_rows_, and what they must leave by loops over Python's numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

NAN, INFINITY = math.nan, math.inf
CLASSES, GAP = 6, 3
#: A few roundings: of the sum of class weights, of the division.
CLOSE = {torch.float32: 4e-7, torch.float64: 1e-14}

#: The arguments as a row kernel leaves them.
Run = Callable[..., Any]


def in_place(kernels: Any) -> Run:
    """Row kernels that write to what they are given."""

    def run(name: str, *arguments: Any) -> tuple[Any, ...]:
        getattr(kernels, name)(*arguments)
        return arguments

    return run


@dataclass(frozen=True)
class Case:
    """labels, target_weight [N, K]; row_weight: one number or [N]."""

    labels: Tensor
    target_weight: Tensor | None
    row_weight: Tensor | None
    normalizer: Tensor | None
    ignore_index: int
    negative_is_absent: bool
    mean: bool
    needs_target_weight: bool
    max_rows: int
    fields: int
    dtype: torch.dtype

    def given(self, row: int) -> list[int]:
        """Places of the targets of the row."""
        kept = [label != self.ignore_index for label in self.labels[row].tolist()]
        if self.negative_is_absent:
            kept = [
                keep and label >= 0
                for keep, label in zip(kept, self.labels[row].tolist(), strict=True)
            ]
        return [place for place, keep in enumerate(kept) if keep]


@st.composite
def cases(draw: Any, rows: Sequence[int] = (0, 1, 2, 7, 40)) -> Case:
    dtype, count = draw(st.sampled_from(list(CLOSE))), draw(st.sampled_from(rows))
    negative_is_absent = draw(st.booleans())
    targets = draw(st.sampled_from([0, 1, 2, 5])) if negative_is_absent else 1
    torch.manual_seed(draw(st.integers(0, 2**31)))
    ignore_index = draw(st.sampled_from([-100, 0, CLASSES + 1]))
    lowest, highest = draw(
        st.sampled_from([(0, CLASSES), (-2, CLASSES), (-2, CLASSES + 3), (CLASSES, CLASSES + 3)])
    )
    labels = torch.randint(lowest, highest, (count, targets))
    labels[torch.rand(count, targets) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))] = ignore_index

    def weights(shape: tuple[int, ...]) -> Tensor:
        values = torch.rand(shape, dtype=dtype)
        values[torch.rand(shape) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0
        values[torch.rand(shape) < draw(st.sampled_from([0.0, 0.0, 0.1]))] = NAN
        return values

    def maybe(value: Tensor) -> Tensor | None:
        return value if draw(st.booleans()) else None

    row_weight = draw(st.sampled_from([None, (), (1,), (1, 1), (count,), (count,)]))
    return Case(
        labels,
        maybe(weights((count, targets))),
        None if row_weight is None else weights(row_weight),
        maybe(torch.rand((), dtype=dtype) + 0.5),
        ignore_index,
        negative_is_absent,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from([-1, -1, 0, 1, 5, 40])),
        draw(st.sampled_from([2, 3])),
        dtype,
    )


def exact_scale(case: Case) -> tuple[list[float], list[bool]]:
    """The scale of each row, and whether it has a target."""
    count, target_weight = case.labels.shape[0], case.target_weight
    weight_of = None if target_weight is None else target_weight.double().tolist()
    row_weight = torch.ones(1) if case.row_weight is None else case.row_weight.view(-1)
    scale, present, counted = [], [], []
    for row, weight in enumerate(row_weight.double().expand(count).tolist()):
        places = case.given(row)
        needed = (
            weight_of is None
            or not case.needs_target_weight
            or any(weight_of[row][k] != 0 for k in places)
        )
        present.append(bool(places))
        scale.append(weight if places and needed else 0.0)
        of_class = None if case.negative_is_absent else weight_of
        counted.append((1.0 if of_class is None else of_class[row][0]) if places else 0.0)
    divisor = 1.0
    if case.normalizer is not None:
        divisor = case.normalizer.item()
    elif case.mean:
        divisor = math.fsum(counted) or 1.0
    scale = [each / divisor if each else 0.0 for each in scale]
    if 0 <= case.max_rows < sum(present):
        scale = [NAN if has else each for each, has in zip(scale, present, strict=True)]
    return scale, present


def exact_totals(case: Case, scale: list[float], present: list[bool]) -> list[int]:
    rows = [row for row, has in enumerate(present) if has]
    count, targets = case.labels.shape
    outside = [
        row * targets + place
        for row in range(count)
        for place in case.given(row)
        if not 0 <= case.labels[row, place] < CLASSES
    ]
    active = sum(each != 0 for each in scale)
    return [
        len(rows),
        active,
        rows[0] if rows else -1,
        rows[-1] if rows else -1,
        outside[0] if outside else -1,
    ]


def check_prepared(run: Run, case: Case, *, reads: bool = True) -> None:
    """reads: whether the totals behind the first are there."""
    (count, targets), dtype = case.labels.shape, case.dtype
    scale, totals = torch.full((count,), 77.0, dtype=dtype), torch.full((5,), 77)
    wide = torch.full((case.fields, count + GAP), 77.0, dtype=dtype)
    target_logit, prediction = (
        torch.full((count, targets), 77.0, dtype=dtype),
        torch.full((count,), 77),
    )
    given = case.labels, case.target_weight, case.row_weight, case.normalizer
    options = (
        case.ignore_index,
        case.negative_is_absent,
        CLASSES,
        case.mean,
        case.needs_target_weight,
        case.max_rows,
    )
    before = [each.clone() for each in given if each is not None]
    found = run(
        "prepare_rows_", *given, scale, totals, wide[:, :count], target_logit, prediction, *options
    )[: 9]  # fmt: skip
    for kept, each in zip(before, [each for each in found[:4] if each is not None], strict=True):
        torch.testing.assert_close(each, kept, rtol=0, atol=0, equal_nan=True)
    scale, totals, stats, target_logit, prediction = found[4:]
    exact, present = exact_scale(case)
    close = CLOSE[dtype]
    expected = torch.tensor(exact, dtype=torch.float64)
    torch.testing.assert_close(scale.double(), expected, rtol=close, atol=0, equal_nan=True)
    assert torch.equal(scale == 0, expected == 0)
    of_all = exact_totals(case, exact, present)
    assert totals.tolist() == (of_all if reads else [of_all[0], -1, -1, -1, -1])
    assert (stats[0] == 0).all() and stats[1:].isnan().all()
    whole = stats.new_empty(0).set_(stats.untyped_storage()).view(case.fields, -1)
    assert (whole[:, count:] == 77).all()
    assert target_logit.isnan().all() and (prediction == -1).all()


def finished(run: Run, losses: Tensor, scale: Tensor, fields: int = 2) -> Tensor:
    stats = torch.full((fields, len(losses) + GAP), NAN, dtype=losses.dtype)[:, : len(losses)]
    stats[0] = losses
    return run("finish_rows_", stats, scale, torch.full((), 77.0, dtype=torch.float64))[2]


def check_long_sums(run: Run, rows: int) -> None:
    """A tenth in every row: what a sum in one piece gets wrong in the eleventh digit."""
    for dtype in CLOSE:
        losses, scale = torch.full((rows,), 0.1, dtype=dtype), torch.full((rows,), 0.5, dtype=dtype)
        exact = rows * (losses[0] * scale[0]).item()
        for fields in (1, 4):
            assert abs(finished(run, losses, scale, fields).item() / exact - 1) <= 2e-15


def check_finished(run: Run, dtype: torch.dtype, rows: int) -> None:
    losses, scale = torch.randn(rows, dtype=dtype), torch.rand(rows, dtype=dtype)
    exact = math.fsum((losses * scale).tolist())
    size = (losses * scale).abs().double().sum().item()
    assert abs(finished(run, losses, scale).item() - exact) <= 1e-14 * size
    if rows < 4:
        return
    for place, value in enumerate((NAN, INFINITY, -INFINITY)):
        losses[place], scale[place] = value, -0.0 if place else 0.0
    exact = math.fsum((losses[3:] * scale[3:]).tolist())
    assert abs(finished(run, losses, scale).item() - exact) <= 1e-14 * size
    scale[1] = 1
    assert finished(run, losses, scale).item() == INFINITY
    scale[0] = 1
    assert finished(run, losses, scale).isnan()
    losses[:3], scale[:3] = 0, 0
    scale[3] = NAN
    assert finished(run, losses, scale).isnan()


def check_predictions(run: Run, dtype: torch.dtype) -> None:
    """Of a row without a target; of one that continues on other devices the row's own."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    for columns, targets in ((33, 1), (1500, 2)):
        logits = torch.randn(4, columns).to(dtype)
        best = logits.double().argmax(1)
        labels = torch.tensor([[3], [-100], [0], [-7]]).expand(4, targets).contiguous()
        weight = None if targets == 1 else torch.ones(4, targets, dtype=work)
        if targets == 1:
            labels[3] = -100
        for softmax_partials in (None, torch.zeros(4, 4, dtype=work)):
            for gradient in (False, True):
                found = run(
                    "cross_entropy_rows_", logits.clone(), labels, weight, None, None, None,
                    torch.zeros(2, 4, dtype=work), torch.zeros(4, targets, dtype=work),
                    torch.zeros(4).long(), -100, targets > 1, 0.0, 0.0, 0.0, 1.0, gradient,
                    softmax_partials,
                )[8]  # fmt: skip
                given = torch.tensor([True, False, True, False])
                of_shard = softmax_partials is not None
                assert torch.equal(found, best if of_shard else torch.where(given, best, -1))
