"""A tiny decoder and the formula by hand for tests of torchtitan's adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("torchtitan")
pytest.importorskip("nitp_ops.trainers.torchtitan", exc_type=ImportError)
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.llama3 import model_registry

ROOT = Path(__file__).parents[3]


SPEC = "ntp + 0.8*nitp(target_layer=1) + late: 0.5*nitp(target_layer=2, source=last_residual)"


def tiny_decoder(layers: int = 3) -> Decoder:
    """torchtitan's debug llama3 with fewer blocks and plain causal attention, on the CPU."""
    config: Any = model_registry("debugmodel").model
    del config.layers[layers:]
    for layer in config.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    model = config.build()
    model.init_states()
    return model


def ragged_batch(seed: int = 0, rows: int = 2, length: int = 12) -> dict[str, Any]:
    """Two documents a row, labels missing here and there."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2048, (rows, length + 1), generator=draw)
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=draw) < 0.3] = -100
    positions = torch.cat([torch.arange(5), torch.arange(length - 5)]).repeat(rows, 1)
    return {"inputs": tokens[:, :-1].contiguous(), "labels": labels, "positions": positions}


def formula(model: Decoder, batch: dict[str, Tensor]) -> Tensor:
    """NTP and the two NITP terms of SPEC, pair by pair, from the model's own forward pass."""
    states: dict[int, Tensor] = {}
    objective: Any = model.nitp_objective
    hidden = model.tok_embeddings(batch["inputs"])
    for k, layer in enumerate(model.layers.values(), 1):
        hidden = states[k] = layer(hidden, None, batch["positions"])
    last, logits = model.norm(hidden), model.lm_head(model.norm(hidden))
    rows, length = batch["inputs"].shape
    every = [(b, t) for b in range(rows) for t in range(length)]
    ntp = [
        F.cross_entropy(logits[b, t], y) for b, t in every if (y := batch["labels"][b, t]) != -100
    ]
    pairs = [(b, t) for b, t in every if t + 1 < length and t + 1 != 5]

    def nitp(label: str, source: Tensor, k: int) -> Tensor:
        own: Any = objective.terms[label]
        gate, up = own.gate_up.chunk(2)
        p = [own.down @ (F.silu(gate @ source[b, t]) * (up @ source[b, t])) for b, t in pairs]
        z = [states[k][b, t + 1].detach() for b, t in pairs]
        return torch.stack(
            [1 - F.cosine_similarity(x, y, dim=0) for x, y in zip(p, z, strict=True)]
        ).mean()

    return torch.stack(ntp).mean() + 0.8 * nitp("nitp", last, 1) + 0.5 * nitp("late", hidden, 2)


def gradients(loss: Tensor, model: Decoder) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def same(mine: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        assert (mine[name] - value).norm() <= tolerance * value.norm(), name
