"""The bag of words of the near future, against the binary cross-entropies that define it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nitp_ops.engine.composite import CompositeObjective
from nitp_ops.engine.modules import logit_losses
from nitp_ops.objectives import FSPBagOfWords, ModelInfo, SpecError, Streams, build
from tests.support.objectives_cases import INFO, Batch, assert_same, gradients, make_batch, pairs


def bags(
    batch: Batch, tau: int, target_ok: Tensor | None = None
) -> dict[tuple[int, int], set[int]]:
    """Position (b, t) -> the set of its tokens t+2 to t+tau, for the positions whose set is not
    empty."""
    found: dict[tuple[int, int], set[int]] = {}
    for k in range(2, tau + 1):
        for b, t in pairs(batch, k, target_ok):
            found.setdefault((b, t), set()).add(int(batch.ids[b, t + k]))
    return found


def equation(
    objective: CompositeObjective,
    batch: Batch,
    tau: int,
    info: ModelInfo = INFO,
    target_ok: Tensor | None = None,
) -> Tensor:
    (weight,) = objective.parameters()
    rows = []
    for (b, t), bag in bags(batch, tau, target_ok).items():
        z = info.logit_scale * (weight @ batch.hidden[b, t])
        z = z if info.softcap is None else info.softcap * torch.tanh(z / info.softcap)
        multi_hot = torch.zeros_like(z)
        multi_hot[sorted(bag)] = 1
        rows.append(F.binary_cross_entropy_with_logits(z, multi_hot))
    return torch.stack(rows).mean()


@pytest.mark.parametrize("rows", [1, 4, 100], ids="chunks of {} rows".format)
@pytest.mark.parametrize(
    "head", [{}, {"softcap": 3.0, "logit_scale": 0.7}], ids=["plain", "softcap and scale"]
)
@pytest.mark.parametrize("tau", [2, 4, 12])
def test_it_equals_its_equation_with_every_gradient(
    tau: int, head: dict, rows: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logit_losses, "CHUNK_LOGITS", rows * INFO.vocab_size)
    info = ModelInfo(
        hidden_size=6,
        vocab_size=11,
        num_layers=5,
        dtype=torch.float64,
        initializer_range=0.5,
        **head,
    )
    batch, objective = make_batch(), build([FSPBagOfWords(tau=tau)], model=info)
    batch.documents = torch.tensor([[0, 0, 0, 1, 1, 1, -1], [0] * 7, [0, 1, 2, 3, 4, 4, 4]])
    out = objective(batch.streams())
    assert_same(
        out.loss, equation(objective, batch, tau, info), [*batch.leaves, *objective.parameters()]
    )
    sets, found = bags(batch, tau), out.metrics.compute()
    assert found["fsp_bow/count"] == len(sets)
    assert found["fsp_bow/tokens"] == pytest.approx(sum(map(len, sets.values())) / len(sets))
    assert found["fsp_bow/loss"] == pytest.approx(out.loss.item(), rel=1e-12)


def test_a_token_that_repeats_counts_once():
    batch, objective = make_batch(), build("fsp_bow", model=INFO)
    batch.ids = torch.tensor([[1, 2, 3, 3, 3, 5, 3]]).expand(3, 7)
    assert bags(batch, 12)[0, 0] == {3, 5}
    assert_same(objective(batch.streams()).loss, equation(objective, batch, 12), [batch.hidden])


def test_masked_targets_are_in_no_bag_and_a_row_without_a_target_does_not_count():
    batch, objective = make_batch(), build("fsp_bow(tau=3)", model=INFO)
    ok = torch.rand(3, 7) < 0.4
    expected = equation(objective, batch, 3, target_ok=ok)
    labels = batch.ids.masked_fill(~ok, -100)
    for streams in (batch.streams(target_mask=ok), batch.streams(labels=labels)):
        assert_same(objective(streams).loss, expected, [batch.hidden])
        assert (
            objective.count(streams)["fsp_bow"].item()
            == len(bags(batch, 3, ok))
            < len(bags(batch, 3))
        )


def test_labels_that_are_shifted_reach_one_token_further():
    batch, objective = make_batch(), build("fsp_bow", model=INFO)
    longer = make_batch(length=8)
    shifted = Streams(
        token_ids=longer.ids[:, :-1], shift_labels=longer.ids[:, 1:], last_hidden=batch.hidden
    )
    with torch.no_grad():
        longer.hidden[:, :7] = batch.hidden
    torch.testing.assert_close(objective(shifted).loss, equation(objective, longer, 12))


def test_logits_of_any_size_stay_exact():
    batch, objective = make_batch(), build("fsp_bow", model=INFO)
    with torch.no_grad():
        batch.hidden.mul_(60)
    assert_same(
        objective(batch.streams()).loss, equation(objective, batch, 12), [batch.hidden], 1e-13
    )


def test_a_nan_under_a_weight_of_zero_stays_out():
    batch, objective = make_batch(), build("ntp + 0*fsp_bow", model=INFO)
    main = build("ntp", model=INFO)(batch.streams()).loss
    with torch.no_grad():
        next(objective.parameters()).fill_(torch.nan)
    out = objective(batch.streams())
    assert torch.equal(out.loss, main)
    for mine, other in zip(
        gradients(out.loss, batch.leaves), gradients(main, batch.leaves), strict=True
    ):
        assert torch.equal(mine, other)
    out.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in objective.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_streams_give_the_float64_value_within_rounding(dtype: torch.dtype):
    batch = make_batch(9, batch=4, length=32)
    info = ModelInfo(hidden_size=6, vocab_size=11, num_layers=5, dtype=dtype, initializer_range=0.5)
    objective = build("fsp_bow", model=info)
    narrow = batch.hidden.detach().to(dtype).requires_grad_()
    mine = objective(batch.streams(last_hidden=narrow)).loss
    exact = build("fsp_bow", model=info).double()(batch.streams()).loss
    assert mine.dtype == torch.float32 and mine.item() == pytest.approx(exact.item(), rel=0.01)
    (expected,) = gradients(exact, [batch.hidden])
    error = gradients(mine, [narrow])[0].double() - expected
    assert error.norm() < 0.02 * expected.norm()


def test_rows_too_short_for_a_window_give_zeros():
    batch, objective = make_batch(length=2), build("fsp_bow", model=INFO)
    out = objective(batch.streams())
    out.loss.backward()
    assert out.loss.item() == 0 and out.metrics.compute()["fsp_bow/count"] == 0
    assert all(p.grad is not None and not p.grad.any() for p in objective.parameters())


def test_the_window_reaches_beyond_the_next_token():
    with pytest.raises(SpecError, match="tau is 1, expected an integer in"):
        build("fsp_bow(tau=1)", model=INFO)


def test_explain_counts_its_parameters_and_flops():
    text = build("fsp_bow", model=ModelInfo(hidden_size=8, vocab_size=32, num_layers=4)).explain()
    assert "256 (V d)" in text and "1,536 (6 V d)" in text and "the tokens t+2 to t+12" in text
