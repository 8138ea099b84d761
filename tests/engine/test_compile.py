"""torch.compile sees one graph, and one graph serves every step of a schedule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nitp_ops.objectives import Window, available, build
from tests.support.objectives_cases import INFO, gradients, make_batch


def test_a_compiled_objective_equals_eager_and_is_not_compiled_again_as_its_weight_changes():
    batch = make_batch()
    batch.documents = torch.tensor([[0, 0, 0, 1, 1, 1, -1]] * 3)
    objective = build("ntp + schedule(to=1, warmup=4)*nitp", model=INFO)

    def loss(hidden: Tensor, state: Tensor, step: Tensor) -> Tensor:
        window = Window(step=step)
        return objective(
            batch.streams(last_hidden=hidden, hidden_states={1: state}), window=window
        ).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    tensors = [batch.hidden, *batch.head.parameters(), *objective.parameters()]

    def agree(step: int) -> None:
        inputs = (batch.hidden, batch.states[1], torch.tensor(step))
        mine, expected = compiled(*inputs), loss(*inputs)
        torch.testing.assert_close(mine, expected, rtol=1e-13, atol=0)
        for a, b in zip(gradients(mine, tensors), gradients(expected, tensors), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)

    agree(0)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in (1, 3, 4, 100):
            agree(step)


@pytest.mark.parametrize("name", available())
def test_every_objective_beside_ntp_is_one_graph(name: str):
    batch = make_batch()
    batch.documents = torch.tensor([[0, 0, 0, 1, 1, 1, -1]] * 3)
    objective = build(f"main: ntp + extra: {name}", model=INFO)
    tensors = [*batch.leaves, *objective.parameters()]

    def loss(hidden: Tensor) -> Tensor:
        return objective(batch.streams(last_hidden=hidden)).loss

    # the tests before it leave graphs of the same code, which count towards a limit
    torch.compiler.reset()
    mine, expected = (
        torch.compile(loss, backend="aot_eager", fullgraph=True)(batch.hidden),
        loss(batch.hidden),
    )
    torch.testing.assert_close(mine, expected, rtol=1e-13, atol=0)
    # a compiled backward may overwrite what it saved, so its graph serves once
    for a, b in zip(
        gradients(mine, tensors, retain_graph=False), gradients(expected, tensors), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_a_narrow_stream_that_several_terms_read_is_widened_inside_the_graph():
    batch = make_batch()
    head = nn.Linear(INFO.hidden_size, INFO.vocab_size, dtype=torch.bfloat16)
    state, hidden = (
        x.detach().bfloat16().requires_grad_() for x in (batch.states[1], batch.hidden)
    )
    objective = build("ntp + nitp + fsp_bow", model=replace(INFO, dtype=torch.bfloat16))

    def loss(hidden: Tensor) -> Tensor:
        streams = batch.streams(
            last_hidden=hidden, last_residual=None, hidden_states={1: state}, head=head
        )
        return objective(streams).loss

    torch.compiler.reset()
    mine, expected = torch.compile(loss, backend="aot_eager", fullgraph=True)(hidden), loss(hidden)
    torch.testing.assert_close(mine, expected)
    for a, b in zip(
        gradients(mine, [hidden], retain_graph=False), gradients(expected, [hidden]), strict=True
    ):
        torch.testing.assert_close(a, b)
