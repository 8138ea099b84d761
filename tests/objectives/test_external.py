"""A loss of the model's own shares weights, schedules, counts and logs with the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nitp_ops.objectives import Need, Streams, build
from tests.support.objectives_cases import INFO, assert_same, gradients, make_batch


def given(**external: object) -> Streams:
    batch = make_batch()
    return batch.streams(external=external)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def test_it_is_the_weighted_sum_over_the_count():
    total = number(6.0)
    out = build("0.3*external", model=INFO)(given(external=(total, 7)))
    assert_same(out.loss, 0.3 * total / 7, [total])
    expected = {
        "loss": 1.8 / 7,
        "loss/external": 1.8 / 7,
        "external/loss": 6 / 7,
        "external/count": 7,
    }
    assert out.metrics.compute() == pytest.approx(expected, rel=1e-12)


def test_the_label_names_the_stream_unless_the_option_does():
    assert build("balance: external", model=INFO).requires == {Need("external", name="balance")}
    assert build("balance: external(stream=router)", model=INFO).requires == {
        Need("external", name="router")
    }


def test_a_missing_name_is_an_error_that_names_it():
    with pytest.raises(
        ValueError,
        match=r"streams lacks external\[balance\], expected "
        r"external\[balance\]",
    ):
        build("balance: external", model=INFO)(given(router=number(1.0)))


def test_a_sum_alone_is_averaged_over_microbatches():
    objective = build("balance: external", model=INFO)
    sums = [number(1.0), number(5.0)]
    ahead = Streams(token_ids=make_batch().ids)  # before the forward pass there is no sum to bring
    counts = objective.count(ahead) + objective.count(ahead)
    assert counts["balance"].item() == 2
    losses = [objective(given(balance=total), counts=counts).loss for total in sums]
    assert_same(losses[0] + losses[1], (sums[0] + sums[1]) / 2, sums)


def test_unequal_counts_of_its_own_give_the_mean_of_the_whole():
    objective = build("ntp + balance: 0.3*external", model=INFO)
    batch, sums, counted = (
        make_batch(),
        [number(3.0), number(-8.0)],
        [torch.tensor(2), torch.tensor(9)],
    )
    parts = [
        batch.part(rows).streams(external={"balance": (total, count)})
        for rows, total, count in zip((slice(0, 1), slice(1, 3)), sums, counted, strict=True)
    ]
    counts = objective.count(parts[0]) + objective.count(parts[1])
    split = [objective(part, counts=counts) for part in parts]
    whole = objective(batch.streams(external={"balance": (sums[0] + sums[1], 11)}))
    assert_same(split[0].loss + split[1].loss, whole.loss, [*batch.leaves, *sums])
    assert (split[0].metrics + split[1].metrics).compute() == pytest.approx(whole.metrics.compute())


def test_the_main_denominator_divides_it_by_the_ntp_count():
    total = number(6.0)
    out = build({"ntp": {}, "external": {"denominator": "main"}}, model=INFO)(given(external=total))
    assert out.metrics.compute()["loss/external"] == pytest.approx(6 / 18)


def test_a_schedule_weighs_it():
    objective = build("schedule(to=1, warmup=4)*external", model=INFO)
    assert [
        objective(given(external=number(2.0)), step=step).loss.item() for step in (0, 2, 4)
    ] == [0, 1, 2]


def test_under_a_weight_of_zero_a_nan_stays_out_and_the_sum_gets_zeros():
    batch, total = make_batch(), number(float("nan"))
    alone = build("ntp", model=INFO)(batch.streams()).loss
    out = build("ntp + 0*external", model=INFO)(batch.streams(external={"external": total}))
    assert torch.equal(out.loss, alone)
    for mine, other in zip(
        gradients(out.loss, batch.leaves), gradients(alone, batch.leaves), strict=True
    ):
        assert torch.equal(mine, other)
    out.loss.backward()
    assert total.grad is not None and total.grad.item() == 0


def test_a_bfloat16_sum_is_divided_in_float32():
    total = torch.tensor(3.0, dtype=torch.bfloat16, requires_grad=True)
    loss = build("external", model=INFO)(given(external=(total, 7))).loss
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(3 / 7, rel=1e-6)


def test_a_count_of_zero_leaves_a_finite_loss():
    total = number(0.0)
    loss = build("external", model=INFO)(given(external=(total, 0))).loss
    assert loss.item() == 0 and gradients(loss, [total])[0].isfinite()


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            torch.ones(2),
            r"external\[external\] is a tensor \(2,\) of torch.float32, expected a "
            r"0-d float sum",
        ),
        (3.0, r"external\[external\] is 3.0, expected a 0-d float sum, or \(sum, count\)"),
        ((torch.tensor(1),), r"external\[external\] is \(tensor\(1\),\), expected a 0-d float sum"),
        ((torch.tensor(1.0), 2.5), r"external\[external\] has the count 2.5, expected an integer"),
        (
            (torch.tensor(1.0), torch.tensor(True)),
            r"has the count a tensor \(\) of torch.bool, "
            r"expected an integer",
        ),
    ],
    ids=str,
)
def test_what_is_no_sum_with_a_count_is_refused(pair: object, message: str):
    with pytest.raises(TypeError, match=message):
        given(external=pair)
