"""TRL's SFTTrainer with an objective on packed rows: a tiny Llama on a standard module, seconds on
a CPU.

    python examples/trainers/trl_sft.py

Lines of the source are the documents; several of them are packed into a row, and neither attention
nor any term of the objective looks across their boundaries. Needs what `pip install trl` brings.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig  # type: ignore[reportPrivateImportUsage]

from nitp_ops.trainers.trl import ObjectiveSFTTrainer


def main() -> None:
    torch.manual_seed(0)
    tokenizer = ByT5Tokenizer()
    lines = [line for line in Path(argparse.__file__).read_text().splitlines() if line.strip()]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=5,
            num_attention_heads=4,
        )
    )
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        packing=True,
        max_length=128,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=30,
        learning_rate=3e-3,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    trainer = ObjectiveSFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": lines[200:]}),
        eval_dataset=Dataset.from_dict({"text": lines[:200]}),
        processing_class=tokenizer,
        objective="ntp + 0.8*nitp(target_layer=0.2)",
    )
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            names = ("loss", "loss/ntp", "loss/nitp", "ntp/accuracy", "nitp/skill")
            print(
                f"step {entry['step']}: " + "  ".join(f"{name} {entry[name]:.4f}" for name in names)
            )
    print(f"the plain model on other lines: {trainer.evaluate()['eval_loss']:.4f}")


if __name__ == "__main__":
    main()
