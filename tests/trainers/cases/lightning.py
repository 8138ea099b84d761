"""Modules, data and the formula by hand for tests of Lightning's adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

pytest.importorskip("lightning")
pytest.importorskip("transformers")
import lightning as L
import transformers

from nitp_ops.objectives import ModelInfo, Streams, build
from nitp_ops.trainers.lightning import objective_loss

SPEC = "ntp + 0.8*nitp(target_layer=1)"


LATE = SPEC + " + late: schedule(to=1, warmup=4)*nitp(target_layer=2)"


QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


QUIET |= {"accelerator": "cpu", "log_every_n_steps": 1}


def llama() -> Any:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
    }
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.3)
    return transformers.LlamaForCausalLM(config).double()


def rows(count: int = 8, length: int = 10) -> Any:
    """Rows of unequal lengths, labels missing here and there: other counts in every batch, and in
    NTP than in NITP."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(32, (count, length), generator=draw)
    mask = (torch.arange(length) < torch.randint(2, length + 1, (count, 1), generator=draw)).long()
    labels = ids.masked_fill((mask == 0) | (torch.rand(ids.shape, generator=draw) < 0.3), -100)
    labels[0] = -100
    return [
        {"input_ids": i, "attention_mask": m, "labels": y}
        for i, m, y in zip(ids, mask, labels, strict=True)
    ]


class Wrapped(L.LightningModule):
    """Wraps a Hugging Face model, with no word of objectives in it."""

    def __init__(self, model: nn.Module, optimizer: Any = torch.optim.SGD) -> None:
        super().__init__()
        self.model, self.optimizer = model, optimizer

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("validation", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), lr=0.1)


class OwnStreams(L.LightningModule):
    """Builds its streams itself, from a model that is no Hugging Face model, and holds its
    objective."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.lower, self.upper = nn.Embedding(32, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 32, bias=False)
        info = ModelInfo(hidden_size=8, vocab_size=32, num_layers=2)
        self.objective = build(SPEC, model=info)
        self.double()

    def streams(self, batch: Any) -> Streams:
        lower = torch.tanh(self.lower(self.embed(batch["input_ids"])))
        return Streams(
            **tokens(batch),
            last_hidden=self.upper(lower),
            hidden_states={1: lower.detach()},
            head=self.head,
        )

    def training_step(self, batch: Any, index: int) -> Tensor:
        return objective_loss(self, self.streams(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def tokens(batch: Any) -> dict[str, Tensor]:
    names = {"token_ids": "input_ids", "attention_mask": "attention_mask", "labels": "labels"}
    return {field: batch[name] for field, name in names.items()}


class Unsized(IterableDataset):
    """The same rows from a loader without a length: Lightning fetches such batches one ahead."""

    def __iter__(self) -> Any:
        return iter(rows())


def formula(model: Any, batch: dict[str, Tensor], objective: Any) -> Tensor:
    """SPEC, pair by pair."""
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    pairs = [(b, t) for b in range(len(ids)) for t in range(ids.shape[1] - 1) if mask[b, t + 1]]
    ntp = [
        F.cross_entropy(out.logits[b, t], labels[b, t + 1])
        for b, t in pairs
        if labels[b, t + 1] != -100
    ]
    own = objective.terms["nitp"]
    gate, up = own.gate_up.chunk(2)
    h, z = out.hidden_states[-1], out.hidden_states[1].detach()
    p = [own.down @ (F.silu(gate @ h[b, t]) * (up @ h[b, t])) for b, t in pairs]
    nitp = [
        1 - F.cosine_similarity(x, z[b, t + 1], dim=0) for x, (b, t) in zip(p, pairs, strict=True)
    ]
    return torch.stack(ntp).mean() + 0.8 * torch.stack(nitp).mean()


def by_hand(windows: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Parameters after one SGD step on the formula for each window."""
    model = llama()
    info = ModelInfo(
        hidden_size=16, vocab_size=32, num_layers=3, dtype=torch.float64, initializer_range=0.3
    )
    model.add_module("nitp_objective", build(SPEC, model=info))
    plain = llama()
    for window in windows:
        batch = {name: torch.stack([row[name] for row in window]) for name in window[0]}
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if "nitp" not in k})
        named = {
            **dict(plain.named_parameters()),
            **dict(model.nitp_objective.named_parameters(prefix="nitp_objective")),
        }
        found = torch.autograd.grad(
            formula(plain, batch, model.nitp_objective), list(named.values()), allow_unused=True
        )
        with torch.no_grad():
            for name, gradient in zip(named, found, strict=True):
                model.get_parameter(name).sub_(0.1 * gradient)
    return {name: p.detach() for name, p in model.named_parameters()}


def fit(module: Any, data: Any, callback: Any, batch_size: int = 2, **options: Any) -> Any:
    checkpoint = options.pop("ckpt_path", None)
    options = {"max_epochs": 1, "enable_checkpointing": False, **QUIET, **options}
    trainer = L.Trainer(callbacks=[callback], **options)
    trainer.fit(module, DataLoader(data, batch_size=batch_size), ckpt_path=checkpoint)
    return trainer
