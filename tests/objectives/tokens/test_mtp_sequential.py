"""mtp_sequential against its equations: one module a depth, each reads the token before the one it
predicts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nitp_ops.engine.modules.blocks import attention_mask
from nitp_ops.objectives import MTPSequential, SpecError, Streams, build, parse
from tests.support.objectives_cases import INFO, Batch, assert_same, gradients, make_batch, pairs


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def depth_losses(batch: Batch, layers: nn.ModuleList, term: MTPSequential) -> dict[int, Tensor]:
    """Mean loss of each offset; a token past the end is embedded as 0, whom no valid row sees."""
    mask = attention_mask(batch.streams())
    hidden = batch.hidden if term.source == "last_hidden" else batch.residual
    hidden = hidden.detach() if term.detach_trunk else hidden
    found = {}
    for k, layer in enumerate(layers, start=1):
        own = dict(layer.named_parameters())
        rows = []
        for b, t in [(b, t) for b in range(len(batch.ids)) for t in range(batch.ids.shape[1])]:
            token = batch.ids[b, t + k] if t + k < batch.ids.shape[1] else 0
            token_state = rms(batch.embed.weight[token], own["enorm.weight"])
            rows.append(
                own["eh_proj.weight"]
                @ torch.cat([token_state, rms(hidden[b, t], own["hnorm.weight"])])
            )
        state = layer.block(torch.stack(rows).view(hidden.shape), mask)  # type: ignore[operator]
        normed = torch.stack([rms(x, own["norm.weight"]) for x in state.flatten(0, 1)]).view(
            state.shape
        )
        hidden = normed if term.source == "last_hidden" else state
        losses = [
            F.cross_entropy(batch.head(normed[b, t]), batch.ids[b, t + k + 1])
            for b, t in pairs(batch, k + 1, batch.extra.get("target_mask"))
        ]
        found[k + 1] = torch.stack(losses).mean()
    return found


def packed_batch() -> Batch:
    batch = make_batch()
    batch.documents = torch.tensor(
        [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, -1, -1], [2, 2, 2, 2, 2, 2, 2]]
    )
    batch.extra["target_mask"] = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) < 0.8
    return batch


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "options",
    ["", "depth=3", "depth=2, source=last_residual", "depth=2, detach_trunk=true"],
    ids=str,
)
def test_it_equals_its_equations_with_every_gradient(options: str, packed: bool):
    batch = packed_batch() if packed else make_batch()
    objective = build(f"mtp_sequential({options})", model=INFO)
    (term,), layers = objective.spec.terms, objective.terms["mtp_sequential"].layers
    assert isinstance(term, MTPSequential) and isinstance(layers, nn.ModuleList)
    for name, parameter in objective.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    losses = depth_losses(batch, layers, term)
    expected = 0.3 / term.depth * torch.stack(list(losses.values())).sum()
    out = objective(batch.streams())
    assert_same(out.loss, expected, [*batch.leaves, *objective.parameters()], 1e-10)
    metrics = out.metrics.compute()
    for offset, loss in losses.items():
        assert metrics[f"mtp_sequential/{offset}/loss"] == pytest.approx(loss.item(), rel=1e-10)
        assert metrics[f"loss/mtp_sequential/{offset}"] == pytest.approx(
            0.3 / term.depth * loss.item(), rel=1e-10
        )


def test_a_detached_trunk_gets_no_gradient_while_embedding_and_head_do():
    batch, objective = make_batch(), build("mtp_sequential(detach_trunk=true)", model=INFO)
    trunk, embed, *head = gradients(
        objective(batch.streams()).loss, [batch.hidden, *batch.leaves[-3:]]
    )
    assert not trunk.any() and embed.any() and all(g.any() for g in head)


def test_pre_shifted_labels_give_the_loss_of_the_longer_row():
    longer = make_batch(length=8)
    objective = build("mtp_sequential(depth=2)", model=INFO)
    shorter = Streams(
        token_ids=longer.ids[:, :-1],
        shift_labels=longer.ids[:, 1:],
        last_hidden=longer.hidden[:, :-1],
        head=longer.head,
        embed=longer.embed,
    )
    expected = objective(longer.streams()).loss
    assert_same(objective(shorter).loss, expected, [*longer.leaves, *objective.parameters()])


def test_packed_documents_train_like_separate_rows():
    batch = make_batch(batch=1, length=7)
    batch.documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    objective = build("mtp_sequential(depth=2)", model=INFO)
    whole = objective(batch.streams())
    parts = [batch.streams(token_ids=batch.ids[:, part], last_hidden=batch.hidden[:, part], **absent())
             for part in (slice(0, 3), slice(3, 7))]  # fmt: skip
    counts = objective.count(parts[0]) + objective.count(parts[1])
    apart = objective(parts[0], counts=counts).loss + objective(parts[1], counts=counts).loss
    assert_same(whole.loss, apart, [*batch.leaves, *objective.parameters()])


def absent() -> dict[str, object]:
    return {"last_residual": None, "hidden_states": {}, "document_ids": None}


def test_masked_targets_are_inputs_all_the_same():
    """labels say what is predicted, token_ids what is read."""
    batch, objective = make_batch(), build("mtp_sequential", model=INFO)
    masked = torch.tensor([False, False, True, False, True, False, False]).expand(3, 7)
    by_mask = objective(batch.streams(target_mask=~masked)).loss
    assert_same(
        objective(batch.streams(labels=batch.ids.masked_fill(masked, -100))).loss,
        by_mask,
        batch.leaves,
    )


def test_the_embedding_is_called_once_a_depth_and_may_be_a_leaf():
    batch, objective, calls = make_batch(), build("mtp_sequential(depth=2)", model=INFO), []
    expected = objective(batch.streams()).loss
    by_leaf = objective(batch.streams(embed=batch.embed.weight)).loss
    assert_same(by_leaf, expected, batch.leaves)
    batch.embed.register_forward_hook(lambda *args: calls.append(args))
    objective(batch.streams())
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed": None}, "streams lacks embed"),
        (
            {"token_ids": None, "labels": make_batch().ids},
            "streams lacks token_ids, expected the ids that embed reads",
        ),
        ({"embed": make_batch().embed.weight * 1}, "embed is a non-leaf tensor"),
        ({"embed": "wte"}, "embed is a str, expected a module, or a tensor"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_streams_that_do_not_fit_are_refused(changes: dict, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        build("mtp_sequential", model=INFO)(make_batch().streams(**changes))


def test_the_parameters_have_the_names_of_the_checkpoints():
    objective = build("mtp_sequential(depth=2)", model=INFO)
    names = {name.split(".")[4] for name, _ in objective.named_parameters()}
    assert names == {"enorm", "hnorm", "eh_proj", "block", "norm"}
    assert objective.get_parameter("terms.mtp_sequential.layers.1.eh_proj.weight").shape == (6, 12)


def test_the_default_weight_is_three_tenths_and_a_schedule_replaces_it():
    assert parse("mtp_sequential").terms[0].weight == 0.3
    streams = make_batch().streams()
    objective = build("[[0, 0.3], [10, 0.1]]*mtp_sequential", model=INFO)
    early, late = (objective(streams, step=step).loss for step in (0, 10))
    torch.testing.assert_close(early, 3 * late)
    torch.testing.assert_close(early, build("mtp_sequential", model=INFO)(streams).loss)


def test_wrong_options_are_refused_and_explain_counts_the_parameters():
    for options, problem in (
        ("depth=0", "depth is 0, expected an integer in"),
        ("source=hidden", 'source is "hidden", expected one of'),
        ("label_smoothing=2", "label_smoothing is 2.0, expected"),
    ):
        with pytest.raises(SpecError, match=problem):
            parse(f"mtp_sequential({options})")
    objective = build("mtp_sequential(depth=2)", model=INFO)
    own = sum(parameter.numel() for parameter in objective.parameters())
    text = objective.explain()
    assert f"{own:,} parameters added" in text and "against tokens t+2, t+3" in text
    assert f"{6 * (2 * 66 + own):,} (6 V d per depth" in text
