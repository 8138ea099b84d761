"""One objective's training: model, projector, optimizer, position in the data; a step, a state."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch

from experiments.console.failure import BadInput, Diverged
from nitp_ops.kernels.select import unavailable_reason
from nitp_ops.objectives import ModelInfo, Spec, Streams, build

from .checkpoint import load_checkpoint, stored_checkpoint
from .data import Corpus, Order
from .model import Decoder, ModelConfig
from .options import Options
from .schedule import warmup_stable_decay

PROVIDED = {
    "token_ids",
    "document_ids",
    "last_hidden",
    "last_residual",
    "hidden_states",
    "head",
    "embed",
}


def model_info(shapes: ModelConfig) -> ModelInfo:
    """What the objectives need to know about the decoder."""
    return ModelInfo(
        hidden_size=shapes.dim,
        vocab_size=shapes.vocab_size,
        num_layers=shapes.layers,
        initializer_range=shapes.initializer_range,
        sequence_length=shapes.context,
    )


def backend_for(device: str) -> str | None:
    """None where row kernels serve the device, else "reference": the objectives as plain PyTorch."""
    return None if unavailable_reason(torch.device(device)) is None else "reference"


class Run:
    """Everything that a step changes.

    Args:
        name: what the run is called in tables and curves: its objective as the user wrote it.
        spec: the parsed objective.
        options: shapes and hyperparameters.
        corpus: what it trains on.
        folder: where its files go.
        backend: of the objectives; None takes the row kernels where they serve the device.
    """

    def __init__(
        self,
        name: str,
        spec: Spec,
        options: Options,
        corpus: Corpus,
        folder: Path,
        backend: str | None = None,
    ) -> None:
        self.name, self.spec, self.options, self.corpus, self.folder = (
            name,
            spec,
            options,
            corpus,
            folder,
        )
        self.device = torch.device(options.device)
        self.model = Decoder(options.model, seed=options.seed).to(self.device)
        self.backend = backend or backend_for(options.device)
        objective = build(
            spec, model=model_info(options.model), seed=options.seed, backend=self.backend
        )
        self.objective = objective.to(self.device)
        self.keep = sorted(need.layer for need in self.objective.requires if need.layer is not None)
        parameters = [*self.model.parameters(), *self.objective.parameters()]
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for p in parameters if p.dim() >= 2],
                    "weight_decay": options.weight_decay,
                },
                {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=options.lr,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.order = Order(len(corpus.train), options.seed)
        self.done = 0
        self.position = 0
        self.tables: dict[str, str] = {}
        """Digests of the tables beside the checkpoint that was restored, by the names of their files."""

    @property
    def checkpoint(self) -> Path:
        """Where the training state is stored."""
        return self.folder / "checkpoint.pt"

    def autocast(self) -> AbstractContextManager:
        """The context of forward passes."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.options.dtype == "bfloat16"
        )

    def tokens(self, ids: torch.Tensor, documents: torch.Tensor) -> Streams:
        """The streams that are known before the forward pass."""
        return Streams(
            token_ids=ids.to(self.device),
            document_ids=documents.to(self.device),
            head=self.model.lm_head,
            embed=self.model.embed,
        )

    def forward(self, tokens: Streams) -> Streams:
        """The same streams with the hidden states beside them."""
        assert tokens.token_ids is not None
        hidden = self.model(tokens.token_ids, keep=self.keep)
        return replace(
            tokens,
            last_hidden=hidden.last_hidden,
            last_residual=hidden.last_residual,
            hidden_states=hidden.hidden_states,
        )

    def step(self) -> dict[str, float]:
        """One optimizer step; what it measured.

        Raises:
            Diverged: the gradient is not finite; the weights are those before the step.
        """
        options = self.options
        rate = warmup_stable_decay(
            self.done, options.steps, options.lr, options.warmup, options.decay
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        window = []
        for _ in range(options.accumulate):
            indices = self.order.at(self.position, options.batch)
            window.append(self.tokens(*self.corpus.train.take(indices)))
            self.position += options.batch
        counts = reduce(add, [self.objective.count(tokens) for tokens in window])
        self.optimizer.zero_grad()
        metrics = []
        for tokens in window:
            with self.autocast():
                out = self.objective(self.forward(tokens), counts=counts, step=self.done)
            out.loss.backward()
            metrics.append(out.metrics)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters(), options.clip or math.inf)
        values = reduce(add, metrics).compute()
        if not torch.isfinite(norm):
            raise Diverged(
                f"{self.name}: at step {self.done} the loss is {values['loss']:g} and the gradient "
                f"norm {norm.item():g}; lower --lr or lengthen --warmup"
            )
        self.optimizer.step()
        row = {"step": self.done, "lr": rate, "gradient_norm": norm.item(), **values}
        self.done += 1
        return row

    def state(self) -> dict[str, Any]:
        """What a later process needs to take the next step exactly as this one would."""
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        return {
            "step": self.done,
            "position": self.position,
            "spec": self.spec.to_dict(),
            "options": self.options.trajectory(),
            "corpus": self.corpus.fingerprint,
            "tables": self.tables,
            "model": self.model.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
        }

    def restore(self) -> None:
        """Continue from the checkpoint.

        Raises:
            BadInput: it is damaged or belongs to another run.
        """
        path = stored_checkpoint(self.checkpoint) or self.checkpoint
        state = load_checkpoint(path)
        refuse_another_run(path, state, self.spec, self.options, self.corpus)
        try:
            self.model.load_state_dict(state["model"])
            self.objective.load_state_dict(state["objective"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise BadInput(f"{path}: damaged, its tensors do not fit this run: {reason}") from error
        torch.set_rng_state(state["rng"]["cpu"])
        if state["rng"]["cuda"]:
            torch.cuda.set_rng_state_all(state["rng"]["cuda"])
        self.done, self.position, self.tables = state["step"], state["position"], state["tables"]

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def refuse_another_run(
    path: Path, state: dict[str, Any], spec: Spec, options: Options, corpus: Corpus
) -> None:
    """Refuse a checkpoint that another objective, other options or another text wrote.

    Raises:
        BadInput: names the first difference.
    """
    stored = {**_flat(state["spec"]), **_flags(state["options"]), "the text": state.get("corpus")}
    wanted = {
        **_flat(spec.to_dict()),
        **_flags(options.trajectory()),
        "the text": corpus.fingerprint,
    }
    for name in [*wanted, *stored]:
        if (before := stored.get(name, "absent")) != (now := wanted.get(name, "absent")):
            raise BadInput(
                f"{path}: written with {name} {before}, this run has {name} {now}; resume with the "
                "same options or choose another --out"
            )


def _flat(spec: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{label}.{name}": value for label, own in spec.items() for name, value in own.items()}


def _flags(options: dict[str, Any]) -> dict[str, Any]:
    return {"--" + name.replace("_", "-"): value for name, value in options.items()}
