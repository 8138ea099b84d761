"""A look at held-out text: cross-entropy a batch, the objective's own numbers, the geometry of the
states."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import NamedTuple

import torch

import nitp_ops
from experiments.console.failure import Diverged
from nitp_ops import geometry
from nitp_ops.objectives import LatentTerm, Spec

from .run import Run


class Latent(NamedTuple):
    """A latent term's held-out numbers."""

    loss: float
    """In the term's own distance."""
    constant_predictor_loss: float
    """What a constant predictor scores; it and skill are NaN for another distance than cosine."""
    skill: float


@dataclass(frozen=True)
class HeldOut:
    """What was measured at one step."""

    step: int
    cross_entropy: float
    """Next token, nats, mean over all targets; never smoothed or weighted, so runs compare."""
    batches: list[float]
    """The same for each batch: equal windows in every run."""
    effective_rank: float
    mean_cosine: float
    rows: int
    latent: dict[str, Latent] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        """One line of the table of validations."""
        return {
            "step": self.step,
            "cross_entropy": self.cross_entropy,
            "effective_rank": self.effective_rank,
            "mean_pairwise_cosine": self.mean_cosine,
            **self.metrics,
        }


def latent_labels(spec: Spec) -> list[str]:
    """Labels of the terms that predict a state, not a token."""
    return [str(term.label) for term in spec.terms if isinstance(term, LatentTerm)]


@torch.no_grad()
def evaluate(run: Run) -> HeldOut:
    """Measure `run` on --eval-windows held-out windows, evenly spaced, the same at every step.

    Raises:
        Diverged: a hidden state is not finite.
    """
    text = run.corpus.held_out
    chosen = torch.linspace(0, len(text) - 1, min(run.options.eval_windows, len(text))).long()
    # At least two batches, so that the deviation between batches is a number.
    size = max(1, min(run.options.batch, len(chosen) // 2))
    geometry_of_states = geometry.Accumulator(
        run.options.dim, source="last hidden state, after the final norm"
    )
    sums, counts, metrics = [], [], []
    for indices in chosen.split(size):
        tokens = run.tokens(*text.take(indices))
        with run.autocast():
            streams = run.forward(tokens)
            out = run.objective(streams, step=run.done)
            total, count = _cross_entropy(run, streams.last_hidden, *text.take(indices))
        sums.append(total)
        counts.append(count)
        metrics.append(out.metrics)
        if not torch.isfinite(streams.last_hidden).all():
            raise Diverged(
                f"{run.name}: at step {run.done} a hidden state is not finite; lower --lr"
            )
        geometry_of_states.update(streams.last_hidden)
    values = reduce(add, metrics).compute()
    shape = geometry_of_states.compute()
    return HeldOut(
        step=run.done,
        cross_entropy=sum(sums) / sum(counts),
        batches=[total / count for total, count in zip(sums, counts, strict=True)],
        effective_rank=shape["effective_rank"]["value"],
        mean_cosine=shape["mean_pairwise_cosine"]["value"],
        rows=shape["effective_rank"]["n"],
        latent={
            label: Latent(*(values.get(f"{label}/{number}", math.nan) for number in Latent._fields))
            for label in latent_labels(run.spec)
        },
        metrics=values,
    )


def _cross_entropy(
    run: Run, hidden: torch.Tensor, ids: torch.Tensor, documents: torch.Tensor
) -> tuple[float, int]:
    labels = torch.where(documents[:, 1:] == documents[:, :-1], ids[:, 1:], -100).to(run.device)
    loss = nitp_ops.linear_cross_entropy(
        hidden[:, :-1], run.model.lm_head.weight, labels, reduction="sum", backend=run.backend
    )
    return loss.item(), int((labels != -100).sum())
