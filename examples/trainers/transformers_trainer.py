"""The Hugging Face Trainer with an objective: a tiny Llama on the source of a standard module,
seconds on a CPU.

    python examples/trainers/transformers_trainer.py

The only line that a plain Trainer does not have is `objective=`.
Needs what `pip install transformers accelerate` brings.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from nitp_ops.trainers.transformers import ObjectiveTrainer


def byte_rows(length: int = 64, count: int = 200) -> Any:
    """Rows of bytes, some shorter than others."""
    text = Path(argparse.__file__).read_bytes()
    rows = [
        text[start : start + length - start // length % 7]
        for start in range(0, count * length, length)
    ]
    return [{"input_ids": torch.tensor(list(row))} for row in rows]


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pad on the right; padding is no token and no target."""
    ids = [row["input_ids"] for row in rows]
    ones = [torch.ones_like(each) for each in ids]
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "attention_mask": torch.nn.utils.rnn.pad_sequence(ones, batch_first=True),
        "labels": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100),
    }


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=5,
            num_attention_heads=4,
        )
    )
    rows, folder = byte_rows(), tempfile.mkdtemp()
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=40,
        learning_rate=3e-3,
        logging_steps=10,
        save_steps=20,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = ObjectiveTrainer(
        model=model,
        args=arguments,
        train_dataset=rows[40:],
        eval_dataset=rows[:40],
        data_collator=collate,
        objective="ntp + schedule(to=0.8, warmup=10)*nitp(target_layer=0.2)",
    )
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            names = ("loss", "loss/ntp", "loss/nitp", "ntp/accuracy", "nitp/skill")
            print(
                f"step {entry['step']}: " + "  ".join(f"{name} {entry[name]:.4f}" for name in names)
            )
    print(f"the plain model on other rows: {trainer.evaluate()['eval_loss']:.4f}")
    trainer.save_model(f"{folder}/export")
    reloaded = LlamaForCausalLM.from_pretrained(f"{folder}/export")
    print(
        f"exported without the projector: {reloaded.num_parameters():,} of "
        f"{model.num_parameters():,} parameters"
    )


if __name__ == "__main__":
    main()
