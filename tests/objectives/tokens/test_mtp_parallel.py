"""mtp_parallel: a head each on one trunk, equal to the paper's head-by-head backward pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nitp_ops.engine.modules.blocks import attention_mask
from nitp_ops.engine.plan import head_passes
from nitp_ops.objectives import CompositeObjective, SpecError, build, parse
from tests.support.objectives_cases import INFO, Batch, assert_same, gradients, make_batch, pairs

PACKED = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, -1, -1], [2, 2, 2, 2, 2, 2, 2]])


def packed_batch() -> Batch:
    batch = make_batch()
    batch.documents = PACKED
    batch.extra["target_mask"] = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) < 0.8
    return batch


def heads(objective: CompositeObjective) -> nn.ModuleList:
    own = objective.terms["mtp_parallel"].heads
    assert isinstance(own, nn.ModuleList)
    for index, parameter in enumerate(own.parameters()):  # the residual heads start at zero
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
    return own


def mean_loss(batch: Batch, hidden: Tensor, k: int) -> Tensor:
    rows = pairs(batch, k, batch.extra.get("target_mask"))
    losses = [F.cross_entropy(batch.head(hidden[b, t]), batch.ids[b, t + k]) for b, t in rows]
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    "options", ["", "(offsets=[1, 2, 3, 4])", "(offsets=[1, 3, 5], heads=residual)"]
)
def test_it_equals_the_head_by_head_backward_pass_through_a_detached_trunk(options: str):
    batch, objective = packed_batch(), build(f"mtp_parallel{options}", model=INFO)
    own, trunk = heads(objective), nn.Linear(6, 6, dtype=torch.float64)
    tensors = [batch.hidden, *trunk.parameters(), *batch.head.parameters(), *objective.parameters()]
    out = objective(batch.streams(last_hidden=trunk(batch.hidden)))
    combined = gradients(out.loss, tensors)

    whole = trunk(batch.hidden)
    detached = whole.detach().requires_grad_()
    term = parse(f"mtp_parallel{options}").terms[0]
    total = 0.0
    for k, head in zip(term.offsets, own, strict=True):  # type: ignore[attr-defined]
        loss = mean_loss(batch, head(detached, attention_mask(batch.streams())), k)
        loss.backward()
        total += loss.item()
        assert out.metrics.compute()[f"mtp_parallel/{k}/loss"] == pytest.approx(
            loss.item(), rel=1e-11
        )
    whole.backward(detached.grad)
    assert out.loss.item() == pytest.approx(total, rel=1e-12)
    for tensor, mine in zip(tensors, combined, strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(mine, tensor.grad, rtol=1e-10, atol=1e-12)


def test_a_residual_head_is_the_trunk_plus_silu_and_starts_as_the_trunk():
    batch = packed_batch()
    objective = build("mtp_parallel(offsets=[2, 4], heads=residual)", model=INFO)
    at_first = objective(batch.streams()).loss
    torch.testing.assert_close(
        at_first, build("mtp_shared(offsets=[2, 4])", model=INFO)(batch.streams()).loss
    )
    assert all(g.any() for g in gradients(at_first, list(objective.parameters())))
    own = heads(objective)
    expected = torch.zeros((), dtype=torch.float64)
    for k, head in zip((2, 4), own, strict=True):
        expected = expected + mean_loss(
            batch, batch.hidden + F.silu(F.linear(batch.hidden, head.get_parameter("weight"))), k
        )
    assert_same(
        objective(batch.streams()).loss, expected, [*batch.leaves, *objective.parameters()], 1e-11
    )


def test_all_heads_and_ntp_share_one_pass_over_the_unembedding(monkeypatch: pytest.MonkeyPatch):
    calls = []
    real = head_passes.grouped_linear_cross_entropy
    monkeypatch.setattr(
        head_passes,
        "grouped_linear_cross_entropy",
        lambda terms, *a, **k: calls.append(len(terms)) or real(terms, *a, **k),
    )
    batch, spec = make_batch(), "ntp + 0.5*mtp_parallel(z_loss=0.1)"
    loss = build(spec, model=INFO)(batch.streams()).loss
    assert calls == [4]
    apart = build("ntp", model=INFO)(batch.streams()).loss
    apart = apart + build("0.5*mtp_parallel(z_loss=0.1)", model=INFO)(batch.streams()).loss
    assert_same(loss, apart, batch.leaves)


def test_a_position_sees_neither_its_future_nor_another_document():
    batch, objective = packed_batch(), build("mtp_parallel(offsets=[2])", model=INFO)
    heads(objective)
    hidden = batch.hidden.detach().clone()
    counted = objective(batch.streams()).metrics.compute()
    # the last in their documents, seen by no valid row
    hidden[0, 3], hidden[0, 6], hidden[2, 5:] = 9.0, 9.0, 9.0
    hidden[1, 5:] = torch.nan
    assert objective(batch.streams(last_hidden=hidden)).metrics.compute() == pytest.approx(
        counted, rel=1e-12
    )


@pytest.mark.parametrize(
    ("spec", "problems"),
    [
        (
            "ntp + mtp_parallel(offsets=[1, 2])",
            ["mtp_parallel: offset 1 is predicted from last_hidden by ntp too"],
        ),
        (
            "mtp_shared + mtp_parallel(offsets=[3])",
            ["mtp_parallel: offset 3 is predicted from last_hidden by mtp_sh"],
        ),
        (
            "a: mtp_parallel(offsets=[2]) + b: mtp_parallel(offsets=[5, 2])",
            [
                "a: offset 2 is predicted from last_hidden by b",
                "b: offset 2 is predicted from last_hidden by a",
            ],
        ),
        (
            "mtp_parallel(offsets=[0])",
            ["mtp_parallel: offsets is [0], expected distinct integers in [1, 1048576]"],
        ),
        (
            "mtp_parallel(heads=blocks)",
            ['mtp_parallel: heads is "blocks", expected one of "block", "residual"'],
        ),
        ("mtp_parallel(z_loss=-1)", ["mtp_parallel: z_loss is -1.0, expected a number >= 0"]),
    ],
)
def test_offsets_that_another_term_predicts_and_wrong_options_are_refused(
    spec: str, problems: list[str]
):
    with pytest.raises(SpecError) as caught:
        parse(spec)
    assert len(caught.value.problems) == len(problems)
    assert all(
        line.startswith(start) for line, start in zip(caught.value.problems, problems, strict=True)
    )


def test_offsets_of_its_own_are_accepted():
    parse(
        "ntp + again: ntp + mtp_shared(offsets=[5]) + mtp_parallel + b: mtp_parallel(offsets=[6]) "
        "+ top"
    )


def test_explain_counts_its_parameters():
    text = build("ntp + mtp_parallel(offsets=[2, 5], heads=residual)", model=INFO).explain()
    assert "residual heads on h_t against tokens t+2, t+5" in text and "72 parameters added" in text
    assert f"{6 * (2 * 11 * 6 + 72):,} (6 V d per head" in text
