"""Lightning with an objective: a tiny Llama on the source of a module of the standard library,
seconds on a CPU.

    python examples/trainers/lightning_fit.py

The module knows nothing of objectives: the callback attaches one, counts the rows of the four
batches of a step, logs the parts of the loss and keeps the own parameters in the checkpoint. Needs
what `pip install lightning transformers` brings.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from nitp_ops.trainers.lightning import ObjectiveCallback


class LanguageModel(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 5,
        }
        self.model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("validation", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def byte_rows(length: int = 64) -> list[dict[str, Tensor]]:
    """The text as rows of bytes; the last one is shorter and padded."""
    text = Path(argparse.__file__).read_bytes()[: 136 * length - length // 2]
    rows = []
    for start in range(0, len(text), length):
        part = list(text[start : start + length])
        padding = length - len(part)
        rows.append(
            {
                "input_ids": torch.tensor(part + [0] * padding),
                "attention_mask": torch.tensor([1] * len(part) + [0] * padding),
                "labels": torch.tensor(part + [-100] * padding),
            }
        )
    return rows


def main() -> None:
    L.seed_everything(0, verbose=False)
    rows: Any = byte_rows()
    folder = tempfile.mkdtemp()
    objective = ObjectiveCallback("ntp + schedule(to=0.8, warmup=10)*nitp(target_layer=0.2)")
    module, logger = LanguageModel(), CSVLogger(folder, name="log")
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[objective],
        accumulate_grad_batches=4,
        max_epochs=4,
        log_every_n_steps=4,
        logger=logger,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        module,
        DataLoader(rows[:120], batch_size=4, shuffle=True),
        DataLoader(rows[120:], batch_size=8),
    )
    print(f"steps {trainer.global_step}  validation {trainer.callback_metrics['validation']:.4f}")
    for name in ("loss", "loss/ntp", "loss/nitp", "nitp/skill"):
        print(f"{name} {trainer.logged_metrics[f'objective/{name}']:.4f}")


if __name__ == "__main__":
    main()
