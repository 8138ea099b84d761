"""torch.compile sees one graph of the latent terms, whatever chunks they run in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nitp_ops.engine.modules import logit_losses
from nitp_ops.objectives import build
from tests.support.objectives_cases import INFO, gradients, make_batch


def test_a_composition_of_latent_terms_compiles_into_one_graph(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logit_losses, "CHUNK_LOGITS", 5 * INFO.vocab_size)
    batch = make_batch()
    batch.documents = torch.tensor([[0, 0, 0, 1, 1, 1, -1]] * 3)
    objective = build(
        "ntp + next_embedding + 0.3*nextlat + fsp_bow + schedule(to=2, warmup=2)*external",
        model=INFO,
    )

    def loss(hidden: Tensor, state: Tensor, step: Tensor) -> Tensor:
        external = {"external": (hidden.square().sum(), 3)}
        streams = batch.streams(last_hidden=hidden, hidden_states={0: state}, external=external)
        return objective(streams, step=step).loss

    inputs = (batch.hidden, batch.states[0], torch.tensor(1))
    mine, expected = (
        torch.compile(loss, backend="aot_eager", fullgraph=True)(*inputs),
        loss(*inputs),
    )
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=0)
    tensors = [batch.hidden, *batch.head.parameters(), *objective.parameters()]
    for a, b in zip(gradients(mine, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
