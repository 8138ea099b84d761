"""Laws that every registered objective obeys with its default options; a new one enters by being
registered."""

from __future__ import annotations

import json

import pytest
import torch

from nitp_ops.engine.registry import find
from nitp_ops.objectives import HeadTerm, LatentTerm, available, build, parse
from tests.support.objectives_cases import INFO, gradients, make_batch

NAMES = available()


@pytest.mark.parametrize("name", NAMES)
def test_the_class_documents_itself_and_is_a_head_or_a_latent_term(name: str):
    cls = find(name)
    assert issubclass(cls, HeadTerm | LatentTerm) and cls.name == name
    assert cls.__doc__ and "Example:" in cls.__doc__ and "Source:" in cls.__doc__


@pytest.mark.parametrize("name", NAMES)
def test_its_spec_survives_json(name: str):
    spec = parse(name)
    assert parse(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("name", NAMES)
def test_its_loss_is_finite_and_has_a_gradient(name: str):
    batch, objective = make_batch(), build(name, model=INFO)
    out = objective(batch.streams())
    assert out.loss.dim() == 0 and out.loss.isfinite()
    assert any(g.any() for g in gradients(out.loss, batch.leaves))
    assert all(g.any() for g in gradients(out.loss, list(objective.parameters())))


@pytest.mark.parametrize("name", NAMES)
def test_it_needs_nothing_beyond_what_it_requires(name: str):
    batch, objective = make_batch(), build(name, model=INFO)
    full = batch.streams()
    read = {str(need) for need in objective.requires}
    absent = {
        field: None
        for field in ("last_hidden", "last_residual", "head", "embed")
        if field not in read
    }
    states = {k: s for k, s in batch.states.items() if f"hidden_states[{k}]" in read}
    torch.testing.assert_close(
        objective(batch.streams(**absent, hidden_states=states)).loss, objective(full).loss
    )


@pytest.mark.parametrize(
    "spec", [*(name for name in NAMES if name != "external"), "nitp(stop_gradient=false)"]
)
def test_gradients_reach_exactly_what_is_required_with_one(spec: str):
    batch, objective = make_batch(), build(spec, model=INFO)
    objective(batch.streams()).loss.backward()
    leaves = {
        "last_hidden": batch.hidden,
        "last_residual": batch.residual,
        "head": batch.head.weight,
    }
    leaves["embed"] = batch.embed.weight
    leaves |= {f"hidden_states[{k}]": state for k, state in batch.states.items()}
    reached = {
        stream for stream, leaf in leaves.items() if leaf.grad is not None and leaf.grad.any()
    }
    assert reached == {str(need) for need in objective.requires if need.grad} - {"token_ids"}


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_masked_rows_change_nothing(name: str):
    batch, objective = make_batch(), build(name, model=INFO)
    padded = make_batch(length=9)
    with torch.no_grad():
        padded.ids[:, :7] = batch.ids
        for mine, other in zip(batch.hidden_leaves, padded.hidden_leaves, strict=True):
            other[:, :7] = mine
            other[:, 7:] = torch.nan
    padded.head = batch.head
    padded.documents = torch.where(torch.arange(9) < 7, 0, -1).expand(3, 9)
    mine, other = objective(batch.streams()), objective(padded.streams())
    torch.testing.assert_close(other.loss, mine.loss, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        gradients(mine.loss, batch.hidden_leaves),
        gradients(other.loss, padded.hidden_leaves),
        strict=True,
    ):
        torch.testing.assert_close(b[:, :7], a, rtol=1e-12, atol=1e-12)
        assert not b[:, 7:].any()


@pytest.mark.parametrize("name", NAMES)
def test_microbatches_add_up_to_the_whole(name: str):
    batch, objective = make_batch(), build(name, model=INFO)
    batch.documents = torch.where(torch.arange(7) < torch.tensor([[2], [7], [1]]), 0, -1)
    whole = objective(batch.streams()).loss
    parts = [batch.part(slice(0, 1)).streams(), batch.part(slice(1, 3)).streams()]
    counts = objective.count(parts[0]) + objective.count(parts[1])
    split = objective(parts[0], counts=counts).loss + objective(parts[1], counts=counts).loss
    tensors = [*batch.leaves, *objective.parameters()]
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(split, tensors), gradients(whole, tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_beside_ntp_its_weight_of_zero_is_bit_identical_to_its_absence(name: str):
    batch = make_batch()
    alone = gradients(build("main: ntp", model=INFO)(batch.streams()).loss, batch.leaves)
    objective = build(f"main: ntp + extra: 0*{name}", model=INFO)
    loss = objective(batch.streams()).loss
    for a, b in zip(alone, gradients(loss, batch.leaves), strict=True):
        assert torch.equal(a, b)
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in objective.parameters())


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_a_nan_in_what_it_alone_reads_stays_out_under_a_weight_of_zero(
    name: str, backend: str | None
):
    batch = make_batch()
    main = build("main: ntp", model=INFO, backend=backend)(batch.streams()).loss
    objective = build(f"main: ntp + extra: 0*{name}", model=INFO, backend=backend)
    with torch.no_grad():
        for tensor in (
            *objective.parameters(),
            *batch.states.values(),
            batch.residual,
            batch.embed.weight,
        ):
            tensor.fill_(torch.nan)
    loss = objective(batch.streams()).loss
    assert torch.equal(loss, main)
    for a, b in zip(gradients(main, batch.leaves), gradients(loss, batch.leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_the_weight_scales_its_loss(name: str):
    streams = make_batch().streams()
    once, thrice = (build(f"{w}*{name}", model=INFO)(streams).loss for w in (1, 3))
    torch.testing.assert_close(thrice, 3 * once)


@pytest.mark.parametrize("name", NAMES)
def test_retaining_the_graph_gives_the_same_gradient_twice(name: str):
    batch = make_batch()
    loss = build(name, model=INFO)(batch.streams()).loss
    first = torch.autograd.grad(0.37 * loss, batch.hidden, retain_graph=True)[0]
    second = torch.autograd.grad(loss, batch.hidden)[0]
    torch.testing.assert_close(first, 0.37 * second, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 3), (2, 1)])
def test_a_batch_without_a_row_that_counts_has_no_loss_and_zero_gradients(
    name: str, batch: int, length: int
):
    streams, objective = make_batch(batch=batch, length=length), build(name, model=INFO)
    out = objective(streams.streams(external={"external": (0 * streams.hidden.sum(), 0)}))
    out.metrics.compute()
    tensors = [*streams.leaves, *objective.parameters()]
    found = gradients(out.loss, tensors)
    assert out.loss == 0 and not any(g.any() for g in found)
