"""A tiny GPTModel's batch and the formula by hand for tests of Megatron's adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("megatron.core")
pytest.importorskip("nitp_ops.trainers.megatron", exc_type=ImportError)
from nitp_ops.trainers.megatron import objective_step

ROOT = Path(__file__).parents[3]


SPEC = "ntp + 0.8*nitp(target_layer=1) + late: 0.5*nitp(target_layer=2, source=last_residual)"


def double(example: Any, **changes: Any) -> Any:
    torch.manual_seed(1)
    sizes = {"num_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "init_method_std": 0.2}
    return example.tiny_gpt(**sizes, **changes).double()


def ragged_batch(rows: int = 4, length: int = 12) -> dict[str, Tensor]:
    """Two documents a row, a loss mask with holes, and a row without a target."""
    draw = torch.Generator().manual_seed(0)
    window = torch.randint(256, (rows, length + 1), generator=draw)
    mask = (torch.rand((rows, length), generator=draw) < 0.6).float()
    mask[0] = 0
    positions = torch.cat([torch.arange(5), torch.arange(length - 5)]).repeat(rows, 1)
    tokens, labels = window[:, :-1].contiguous(), window[:, 1:].contiguous()
    return {"tokens": tokens, "position_ids": positions, "labels": labels, "loss_mask": mask}


def step(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, Any]:
    return objective_step(
        model,
        batch["tokens"],
        batch["position_ids"],
        None,
        batch["labels"],
        batch["loss_mask"],
        **options,
    )


def formula(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """SPEC, pair by pair, from hooks on the plain model: mask[t] masks label t, positions restart
    with a document."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out))
        for name, module in model.named_modules()
        if name
        in ("decoder.layers.0", "decoder.layers.1", "decoder.layers.2", "decoder.final_layernorm")
    ]
    model.eval()
    logits = model(batch["tokens"], batch["position_ids"], None)
    model.train()
    for hook in hooks:
        hook.remove()
    states = {k: seen[f"decoder.layers.{k - 1}"][0].transpose(0, 1) for k in (1, 2, 3)}
    last = seen["decoder.final_layernorm"].transpose(0, 1)
    rows, length = batch["tokens"].shape
    every = [(b, t) for b in range(rows) for t in range(length)]
    ntp = [
        F.cross_entropy(logits[b, t], batch["labels"][b, t])
        for b, t in every
        if batch["loss_mask"][b, t]
    ]
    pairs = [(b, t) for b, t in every if t != 4 and t + 1 < length]

    def nitp(label: str, source: Tensor, k: int) -> Tensor:
        own = model.nitp_objective.terms[label]
        gate, up = own.gate_up.chunk(2)
        p = [own.down @ (F.silu(gate @ source[b, t]) * (up @ source[b, t])) for b, t in pairs]
        z = [states[k][b, t + 1].detach() for b, t in pairs]
        return torch.stack(
            [1 - F.cosine_similarity(x, y, dim=0) for x, y in zip(p, z, strict=True)]
        ).mean()

    return torch.stack(ntp).mean() + 0.8 * nitp("nitp", last, 1) + 0.5 * nitp("late", states[3], 2)


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for n, p, g in zip(names, parameters, found, strict=True)
    }


def assert_same(mine: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            mine[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )
