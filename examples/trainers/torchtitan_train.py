"""torchtitan with an objective: a tiny llama3 on the source of a module of the standard library.

    # with a GPU torchrun --nproc_per_node=1 -m torchtitan.train --module
    examples.trainers.torchtitan_train --config tiny # its model and its objective in a plain loop,
    on the CPU python examples/trainers/torchtitan_train.py

``--objective "ntp"`` on the command line of the first takes the place of the one below.
Needs what `pip install torchtitan` brings.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.optimizer import default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.llama3.config_registry import llama3_debugmodel

from nitp_ops.trainers.torchtitan import (
    ObjectiveTrainer,
    attach_decoder,
    objective_loss,
    tap_decoder,
    with_objective,
)

SPEC = "ntp + 0.8*nitp(target_layer=0.2)"


class Bytes(BaseDataLoader):
    """Random windows of a text as bytes, labels pre-shifted, one document a row."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        dataset_path: str = argparse.__file__

    def __init__(
        self,
        config: Config,
        *,
        seq_len: int,
        local_batch_size: int,
        dp_rank: int = 0,
        dp_world_size: int = 1,
        **_: Any,
    ) -> None:
        self.text = torch.frombuffer(
            bytearray(Path(config.dataset_path).read_bytes()), dtype=torch.uint8
        ).long()
        self.length, self.rows, self.rank, self.ranks, self.batch = (
            seq_len,
            local_batch_size,
            dp_rank,
            dp_world_size,
            0,
        )

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            draw = torch.Generator().manual_seed(self.batch * self.ranks + self.rank)
            self.batch += 1
            starts = torch.randint(len(self.text) - self.length, (self.rows,), generator=draw)
            rows = torch.stack([self.text[start : start + self.length + 1] for start in starts])
            positions = torch.arange(self.length).repeat(self.rows, 1)
            yield {"input": rows[:, :-1], "positions": positions}, rows[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.batch * self.ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batch = state_dict["seen"] // self.ranks


class ByteTokenizer(BaseTokenizer):
    """A byte is a token."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any) -> None:
        super().__init__()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def get_vocab_size(self) -> int:
        return 256


def tiny() -> ObjectiveTrainer.Config:
    """A config function: torchtitan's debug model (6 blocks, 256 wide) with the objective above."""
    config = llama3_debugmodel()
    assert config.model_spec is not None
    for layer in config.model_spec.model.layers:  # type: ignore[attr-defined]
        # one document a row: causal alone will do
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config.dataloader, config.tokenizer = Bytes.Config(), ByteTokenizer.Config()
    config.training.local_batch_size, config.training.seq_len, config.training.steps = 4, 64, 10
    config.training.global_batch_size = 8  # two microbatches a step on one GPU
    config.training.disable_cuda_graphs = True  # an objective asks for it
    config.optimizer = default_adamw(lr=1e-3)
    return with_objective(config, SPEC)


def main() -> None:
    torch.manual_seed(0)
    config = tiny()
    assert config.model_spec is not None
    model = config.model_spec.model.build()
    assert isinstance(model, Decoder)
    model.init_states()
    objective = attach_decoder(model, config.objective)
    tapped = tap_decoder(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = iter(Bytes.Config().build(seq_len=config.training.seq_len, local_batch_size=4))
    print(objective.explain())
    for step in range(config.training.steps):
        inputs, labels = next(batches)
        out = objective_loss(
            model, tapped, inputs["input"], labels, step=step, positions=inputs["positions"]
        )
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values = out.metrics.compute()
        print(
            f"step {step}  "
            + "  ".join(f"{name} {values[name]:.4f}" for name in ("loss", "loss/ntp", "loss/nitp"))
        )


if __name__ == "__main__":
    main()
