"""For the tests with trainers: a tiny Llama, ragged rows, and the objective written out by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER, WEIGHT = 1, 0.8
SPEC = f"ntp + {WEIGHT}*nitp(target_layer={LAYER})"
VOCABULARY = 48


def tiny_llama(dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """Three blocks of width 16, random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).to(dtype=dtype)  # type: ignore[reportArgumentType]


def ragged_rows(count: int = 8, seed: int = 1) -> Any:
    """Rows of 4 to 11 tokens whose first tokens are a prompt, without labels; the last row has no
    label at all."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        length, prompt = 4 + 7 * (index % 2) + (index % 3 - 1), 1 + index % 3
        ids = torch.randint(1, VOCABULARY, (length,), generator=draw).tolist()
        prompt = length if index == count - 1 else prompt
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def padded(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A batch padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (longest - len(values))

    return {
        "input_ids": torch.tensor([pad(row["input_ids"], 0) for row in rows]),
        "labels": torch.tensor([pad(row["labels"], -100) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
    }


class ByHand(nn.Module):
    """The plain model and the projector of an attached one, both copied, with the loss in plain
    PyTorch."""

    def __init__(self, plain: nn.Module, objective: nn.Module) -> None:
        super().__init__()
        self.plain = copy.deepcopy(plain)
        self.projector = nn.ParameterDict(
            {name.replace(".", "_"): p.detach().clone() for name, p in objective.named_parameters()}
        )

    def sums(self, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """``{term: (SUM, COUNT)}`` of one batch."""
        inputs = {
            name: value
            for name, value in batch.items()
            if name in ("input_ids", "attention_mask", "position_ids")
        }
        out = self.plain(**inputs, output_hidden_states=True, use_cache=False)
        document = document_ids(batch)
        joined = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)
        targets = batch["labels"][:, 1:].masked_fill(~joined, -100)
        ntp = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum")
        gate_up, down = self.projector["terms_nitp_gate_up"], self.projector["terms_nitp_down"]
        gate, up = gate_up.chunk(2)
        h, z = out.hidden_states[-1][:, :-1], out.hidden_states[LAYER][:, 1:].detach()
        predicted = (F.silu(h @ gate.T) * (h @ up.T)) @ down.T
        nitp = (1 - F.cosine_similarity(predicted, z, dim=-1))[joined].sum()
        return {"ntp": (ntp, (targets != -100).sum()), "nitp": (nitp, joined.sum())}

    def loss(
        self, batches: Iterable[dict[str, Tensor]], weights: dict[str, float] | None = None
    ) -> Any:
        """``sum of weight * SUM / COUNT`` over all batches."""
        weights = weights or {"ntp": 1.0, "nitp": WEIGHT}
        found = [self.sums(batch) for batch in batches]
        return sum(
            weight * sum(f[term][0] for f in found) / sum(f[term][1] for f in found)
            for term, weight in weights.items()
        )

    def step(self, loss: Any, rate: float) -> None:
        """One step of gradient descent."""
        self.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad

    def check(self, model: Any, rtol: float = 1e-9, atol: float = 1e-12) -> None:
        """The attached model has these parameters."""
        mine = {name: p for name, p in model.named_parameters() if "nitp_objective" not in name}
        for name, parameter in self.plain.named_parameters():
            torch.testing.assert_close(
                mine[name], parameter, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
            )
        own = {name.replace(".", "_"): p for name, p in model.nitp_objective.named_parameters()}
        for name, parameter in self.projector.items():
            torch.testing.assert_close(
                own[name], parameter, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
            )


def document_ids(batch: dict[str, Tensor]) -> Tensor:
    """>= 0 the document, -1 padding."""
    if "attention_mask" in batch:
        return batch["attention_mask"] - 1
    if "position_ids" in batch:
        return (batch["position_ids"] == 0).cumsum(-1) - 1
    return torch.zeros_like(batch["input_ids"])


def trainer_arguments(folder: Any, cls: Any = None, **options: Any) -> Any:
    """Plain gradient descent on the CPU, every step in the log, nothing saved or reported."""
    from transformers import TrainingArguments

    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return (cls or TrainingArguments)(**(defaults | options))
