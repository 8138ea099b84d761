"""A plain loop with Accelerate and an objective: a tiny Llama on a standard module, seconds on a
CPU.

    python examples/trainers/accelerate_loop.py
    accelerate launch --cpu examples/trainers/accelerate_loop.py

Three lines differ from a loop without it: the attached objective, the loop over its windows, and
its `backward`. Needs what `pip install accelerate transformers` brings.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import nitp_ops
from nitp_ops.trainers.accelerate import Accumulation


def byte_rows(length: int = 64, count: int = 160) -> Any:
    """Rows of bytes with their labels; the first bytes of some rows are no targets."""
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()[: count * length])).view(
        count, length
    )
    prompt = torch.arange(length) < torch.arange(count).unsqueeze(1) % 9
    labels = text.masked_fill(prompt, -100)
    return [
        {"input_ids": ids, "labels": targets} for ids, targets in zip(text, labels, strict=True)
    ]


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=5,
            num_attention_heads=4,
        )
    )
    handle = nitp_ops.attach(model, "ntp + schedule(to=0.8, warmup=10)*nitp(target_layer=0.2)")
    accumulation = Accumulation(accelerator, handle)
    accelerator.register_for_checkpointing(accumulation)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=3e-3)
    handle.check(optimizer)
    loader: Any = DataLoader(byte_rows(), batch_size=2, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(2):
        for batch in accumulation(loader):
            with accelerator.accumulate(model):
                loss: Tensor = model(**batch).loss
                accumulation.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients and accumulation.step % 10 == 0:
                found = accumulation.take_log()
                names = ("loss", "loss/ntp", "loss/nitp", "ntp/accuracy", "nitp/skill")
                line = "  ".join(f"{name} {found[name]:.4f}" for name in names)
                accelerator.print(f"step {accumulation.step}: {line}")
    folder = tempfile.mkdtemp()
    accelerator.save_state(folder)
    accelerator.load_state(folder)
    accelerator.print(f"saved and resumed at step {accumulation.step}")


if __name__ == "__main__":
    main()
