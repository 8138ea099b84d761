"""Megatron-Core with an objective: a tiny GPTModel on the source of a module of the standard
library, on the CPU.

    python examples/trainers/megatron_step.py

`model_provider` and `forward_step` are what a training script of Megatron's hands to ``pretrain``.
Its schedules and its DistributedDataParallel need a GPU: here a short loop does their part, with
its own `forward_step_calc_loss`, and an attention in plain PyTorch stands in the layer spec,
because Megatron's asks for a GPU. Needs what `pip install megatron-core` brings.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nitp_ops.trainers.megatron import attach_gpt, objective_step

LENGTH, MICROBATCHES = 64, 2


class PlainAttention(nn.Module):
    """Causal attention in plain PyTorch on Megatron's layout: [T, B, heads, width] to [T, B, heads
    * width]."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.permute(2, 0, 1, 3).flatten(2)


def tiny_gpt(**changes: Any) -> GPTModel:
    config = TransformerConfig(
        **{
            "num_layers": 5,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "normalization": "RMSNorm",
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "bias_dropout_fusion": False,
            "use_cpu_initialization": True,
            "calculate_per_token_loss": True,
            **changes,
        }
    )
    spec: Any = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = PlainAttention
    return GPTModel(config, spec, vocab_size=256, max_sequence_length=LENGTH)


def model_provider() -> GPTModel:
    model = tiny_gpt()
    attach_gpt(model, "ntp + 0.8*nitp(target_layer=0.2)")
    return model


def batches(rows: int = 4) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """tokens, labels (pre-shifted), loss_mask, position_ids: random windows of bytes, spaces not
    asked for."""
    text = torch.frombuffer(
        bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8
    ).long()
    draw = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(text) - LENGTH, (rows,), generator=draw)
        window = torch.stack([text[start : start + LENGTH + 1] for start in starts])
        labels = window[:, 1:].contiguous()
        yield (
            window[:, :-1].contiguous(),
            labels,
            (labels != ord(" ")).float(),
            torch.arange(LENGTH).repeat(rows, 1),
        )


def forward_step(
    data_iterator: Iterator[tuple[Tensor, ...]], model: nn.Module
) -> tuple[Tensor, Any]:
    tokens, labels, loss_mask, position_ids = next(data_iterator)
    return objective_step(model, tokens, position_ids, None, labels, loss_mask)


def main() -> None:
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model = model_provider()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = batches()
    for step in range(30):
        reports: list[dict[str, Tensor]] = []
        tokens = torch.zeros((), dtype=torch.int)
        for _ in range(MICROBATCHES):
            output, loss_func = forward_step(data, model)
            loss, n = forward_step_calc_loss(
                model, output, loss_func, model.config, None, False, MICROBATCHES, reports
            )
            loss.backward()
            tokens += n
        for parameter in model.parameters():
            parameter.grad.div_(tokens)  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            means = {name: sum(report[name] for report in reports) for name in reports[0]}
            shown = [f"{name} {total / n:.4f}" for name, (total, n) in means.items()]  # type: ignore[misc]
            print(f"step {step}  " + "  ".join(shown))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
