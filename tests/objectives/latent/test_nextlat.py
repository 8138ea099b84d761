"""Next-latent prediction against its equations, written out by hand in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nitp_ops.engine.modules import logit_losses
from nitp_ops.objectives import (
    CompositeObjective,
    ModelInfo,
    Need,
    NextLat,
    SpecError,
    Streams,
    build,
)
from tests.support.objectives_cases import INFO, Batch, assert_same, gradients, make_batch, pairs


def logits(batch: Batch, h: Tensor, info: ModelInfo) -> Tensor:
    z = info.logit_scale * F.linear(h, batch.head.weight.detach(), batch.head.bias.detach())
    return z if info.softcap is None else info.softcap * torch.tanh(z / info.softcap)


def equation(
    objective: CompositeObjective, batch: Batch, info: ModelInfo = INFO, table: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(smooth-L1, KL), means over the pairs inside a document; E is the batch's unless given."""
    own = dict(objective.terms["nextlat"].named_parameters())
    table = batch.embed.weight if table is None else table
    smooth, kl = [], []
    for b, t in pairs(batch, 1):
        x = torch.cat([batch.hidden[b, t], table[batch.ids[b, t + 1]]])
        p = batch.hidden[b, t] + own["leave"] @ F.gelu(own["middle"] @ F.gelu(own["enter"] @ x))
        target = batch.hidden[b, t + 1].detach()
        error = (p - target).abs()
        smooth.append(torch.where(error < 1, error.square() / 2, error - 0.5).mean())
        log_q, log_p = (logits(batch, h, info).log_softmax(-1) for h in (target, p))
        kl.append((log_q.exp() * (log_q - log_p)).sum())
    return torch.stack(smooth).mean(), torch.stack(kl).mean()


def leaves(objective: CompositeObjective, batch: Batch) -> list[Tensor]:
    return [*batch.leaves, *objective.parameters()]


@pytest.mark.parametrize("rows", [1, 4, 100], ids="chunks of {} rows".format)
@pytest.mark.parametrize(
    "head", [{}, {"softcap": 3.0, "logit_scale": 0.7}], ids=["plain", "softcap and scale"]
)
def test_it_equals_its_equation_with_every_gradient(
    head: dict, rows: int, monkeypatch: pytest.MonkeyPatch
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
    batch, objective = make_batch(), build("nextlat", model=info)
    batch.documents = torch.tensor([[0, 0, 0, 1, 1, 1, -1], [0] * 7, [0, 1, 2, 3, 4, 4, 4]])
    smooth, kl = equation(objective, batch, info)
    out = objective(batch.streams())
    assert_same(out.loss, smooth + kl, leaves(objective, batch))
    expected = {"nextlat/smooth_l1": smooth.item(), "nextlat/kl": kl.item(), "nextlat/count": 12}
    found = out.metrics.compute()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("smooth_weight", "kl_weight"), [(0.25, 3), (2, 0), (0, 0.5)])
def test_its_losses_have_weights_of_their_own(smooth_weight: float, kl_weight: float):
    batch = make_batch(1)
    term = NextLat(smooth_l1_weight=smooth_weight, kl_weight=kl_weight, intermediate_size=5)
    objective = build([term], model=INFO)
    smooth, kl = equation(objective, batch)
    out = objective(batch.streams())
    assert_same(out.loss, smooth_weight * smooth + kl_weight * kl, leaves(objective, batch))
    reported = {name.partition("/")[2] for name in out.metrics.compute()} & {"smooth_l1", "kl"}
    assert reported == {
        name for name, weight in (("smooth_l1", smooth_weight), ("kl", kl_weight)) if weight
    }


def test_without_the_kl_it_needs_no_head():
    batch, objective = make_batch(), build("nextlat(kl_weight=0)", model=INFO)
    assert objective.requires == {Need("token_ids"), Need("last_hidden"), Need("embed")}
    assert objective(batch.streams(head=None)).loss.isfinite()


def test_an_exact_prediction_of_a_constant_state_costs_nothing():
    batch, objective = make_batch(), build("nextlat", model=INFO)
    with torch.no_grad():
        batch.hidden.copy_(torch.linspace(-1, 1, 6))
        for parameter in objective.parameters():
            parameter.zero_()
    assert objective(batch.streams()).loss.item() == pytest.approx(0, abs=1e-15)


def test_the_head_gets_no_gradient_and_the_embedding_does():
    batch, objective = make_batch(), build("nextlat", model=INFO)
    loss = objective(batch.streams()).loss
    assert not any(g.any() for g in gradients(loss, list(batch.head.parameters())))
    assert gradients(loss, [batch.embed.weight])[0].any()


def test_an_embedding_module_is_called_and_a_leaf_is_a_table():
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return 3 * super().forward(input)

    batch, objective = make_batch(), build("nextlat", model=INFO)
    scaled = Scaled(11, 6, dtype=torch.float64)
    table = scaled.weight.detach().clone().requires_grad_()
    smooth, kl = equation(objective, batch, table=3 * table)
    expected = gradients(smooth + kl, [table, batch.hidden])
    for mine, other in zip(
        gradients(objective(batch.streams(embed=scaled)).loss, [scaled.weight, batch.hidden]),
        expected,
        strict=True,
    ):
        torch.testing.assert_close(mine, other)
    smooth, kl = equation(objective, batch, table=table)
    assert_same(objective(batch.streams(embed=table)).loss, smooth + kl, [table, batch.hidden])
    with pytest.raises(ValueError, match="embed is a non-leaf tensor"):
        objective(batch.streams(embed=table * 1))


def test_the_embedded_tokens_are_the_input_not_the_labels():
    batch, objective = make_batch(), build("nextlat", model=INFO)
    plain = objective(batch.streams()).loss
    masked = torch.full_like(batch.ids, -100)
    assert torch.equal(objective(batch.streams(labels=masked)).loss, plain)
    with pytest.raises(ValueError, match="nextlat: token_ids is missing"):
        objective(batch.streams(token_ids=None, labels=masked))


def test_padding_may_hold_any_id():
    batch, objective = make_batch(), build("nextlat", model=INFO)
    batch.documents = torch.where(torch.arange(7) < 5, 0, -1).expand(3, 7)
    plain = objective(batch.streams()).loss
    ids = batch.ids.masked_fill(batch.documents < 0, -1)
    assert torch.equal(objective(batch.streams(token_ids=ids)).loss, plain)


def test_a_nan_under_a_weight_of_zero_stays_out():
    batch, objective = make_batch(), build("ntp + 0*nextlat", model=INFO)
    main = build("ntp", model=INFO)(batch.streams()).loss
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.fill_(torch.nan)
    out = objective(batch.streams())
    assert (
        torch.equal(out.loss, main)
        and out.metrics.compute()["nextlat/kl"] != out.metrics.compute()["nextlat/kl"]
    )
    for mine, other in zip(
        gradients(out.loss, batch.leaves), gradients(main, batch.leaves), strict=True
    ):
        assert torch.equal(mine, other)
    out.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in objective.parameters())


def test_a_token_that_the_bias_rules_out_adds_nothing():
    batch, objective = make_batch(), build("nextlat", model=INFO)
    with torch.no_grad():
        batch.head.bias[3] = -torch.inf
    loss = objective(batch.streams()).loss
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients(loss, [batch.hidden]))


def test_rows_of_one_token_have_no_pair():
    batch, objective = make_batch(length=1), build("nextlat", model=INFO)
    out = objective(batch.streams())
    out.loss.backward()
    assert out.loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in objective.parameters())


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float32])
def test_bfloat16_states_give_the_float64_value_within_rounding(own: torch.dtype):
    batch = make_batch(9, batch=4, length=32)
    info = ModelInfo(hidden_size=6, vocab_size=11, num_layers=5, dtype=own, initializer_range=0.5)
    exact = build("ntp + nextlat", model=info).double()(batch.streams()).metrics.compute()
    narrow = batch.hidden.detach().bfloat16().requires_grad_()
    out = build("ntp + nextlat", model=info)(
        batch.streams(last_hidden=narrow, head=batch.head.bfloat16())
    )
    assert out.loss.dtype == torch.float32
    for name in ("nextlat/smooth_l1", "nextlat/kl"):
        assert out.metrics.compute()[name] == pytest.approx(exact[name], rel=0.05)
    assert gradients(out.loss, [narrow])[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("kl_weight=-1", "kl_weight is -1.0, expected a number >= 0"),
        (
            "smooth_l1_weight=0, kl_weight=0",
            "smooth_l1_weight and kl_weight are 0, expected one of them > 0",
        ),
        ("intermediate_size=0", "intermediate_size is 0, expected a number >= 1"),
    ],
)
def test_weights_and_sizes_are_checked(options: str, message: str):
    with pytest.raises(SpecError, match=message):
        build(f"nextlat({options})", model=INFO)


def test_explain_counts_its_parameters_and_flops():
    info = ModelInfo(hidden_size=8, vocab_size=32, num_layers=4)
    objective = build("nextlat(intermediate_size=16)", model=info)
    parameters = sum(p.numel() for p in objective.parameters())
    text = objective.explain()
    assert f"{parameters} (3 d m + m^2, m = 16)" in text
    assert f"{6 * parameters + 6 * 32 * 8:,} (18 d m + 6 m^2 + 6 V d)" in text


def test_streams_alone_are_enough_for_its_count():
    ids = torch.zeros(2, 5, dtype=torch.int64)
    assert build("nextlat", model=INFO).count(Streams(token_ids=ids))["nextlat"].item() == 8
