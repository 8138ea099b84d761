"""The end of a comparison: a table and sentences, every one made from the runs' numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from rich import box
from rich.table import Table

from .checkpoint import read_table
from .evaluate import HeldOut, Latent, paired_spread
from .fused_head import HeadCost
from .run import Run


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    name: str
    final: HeldOut
    steps: list[dict[str, str]]
    """The rows of steps.csv."""
    looks: list[dict[str, str]]
    """The rows of validation.csv."""
    parameters: int
    own_parameters: int
    """What the objective brought along; not exported."""
    tokens_per_step: int

    @classmethod
    def of(cls, run: Run, final: HeldOut) -> Outcome:
        """Read a run's tables back."""
        return cls(
            name=run.name,
            final=final,
            steps=read_table(run.folder / "steps.csv"),
            looks=read_table(run.folder / "validation.csv"),
            parameters=sum(p.numel() for p in run.model.parameters()),
            own_parameters=sum(p.numel() for p in run.objective.parameters()),
            tokens_per_step=run.options.tokens_per_step,
        )

    @property
    def step_seconds(self) -> float:
        """Median time of a step."""
        return statistics.median(float(row["seconds"]) for row in self.steps)

    @property
    def middle_half(self) -> str:
        """The quartiles of the step time, in milliseconds."""
        seconds = sorted(float(row["seconds"]) for row in self.steps)
        return f"{seconds[len(seconds) // 4] * 1e3:.1f} to {seconds[len(seconds) * 3 // 4] * 1e3:.1f} ms"


def table(outcomes: list[Outcome]) -> Table:
    """One column a run."""
    result = Table(box=box.SIMPLE_HEAD, title="held-out text, after the last step", title_justify="left")
    result.add_column("")
    for outcome in outcomes:
        result.add_column(outcome.name, justify="right")
    looks = [outcome.final for outcome in outcomes]
    rows = {
        "cross-entropy, nats a byte": [f"{look.cross_entropy:.4f}" for look in looks],
        "nitp loss": [_latent(look, lambda latent: latent.loss) for look in looks],
        "constant-predictor floor": [_latent(look, lambda latent: latent.floor) for look in looks],
        "skill = 1 - loss / floor": [_latent(look, lambda latent: latent.skill) for look in looks],
        "effective rank": [f"{look.effective_rank:.2f}" for look in looks],
        "mean pairwise cosine": [f"{look.mean_cosine:.4f}" for look in looks],
        "parameters, exported": [f"{outcome.parameters:,}" for outcome in outcomes],
        "parameters, training only": [f"{outcome.own_parameters:,}" for outcome in outcomes],
        "median step, ms": [f"{outcome.step_seconds * 1e3:.1f}" for outcome in outcomes],
        "tokens a second": [f"{outcome.tokens_per_step / outcome.step_seconds:,.0f}" for outcome in outcomes],
    }
    for label, cells in rows.items():
        result.add_row(label, *cells)
    return result


def sentences(outcomes: list[Outcome]) -> list[str]:
    """What the numbers say, run by run and each run against the first."""
    said = []
    for outcome in outcomes:
        for label, latent in outcome.final.latent.items():
            said.append(f"{outcome.name}: {_against_floor(label, latent)}")
    first, *others = outcomes
    for other in others:
        said += _difference(first, other)
    return said


def _against_floor(label: str, latent: Latent) -> str:
    if latent.loss < latent.floor:
        side = "below"
    else:
        side = "above" if latent.loss > latent.floor else "equal to"
    if math.isnan(latent.floor) or math.isnan(latent.skill):
        return (
            f"{label}: no skill on held-out text, either no pair counts or the floor {latent.floor:.4f} is below 1e-4."
        )
    skill = f"{latent.skill:.2f}"
    return (
        f"{label} loss {latent.loss:.4f} on held-out text is {side} the constant-predictor floor "
        f"{latent.floor:.4f}: skill {skill}."
    )


def _difference(first: Outcome, other: Outcome) -> list[str]:
    one, two = first.final, other.final
    difference, spread = two.cross_entropy - one.cross_entropy, paired_spread(one, two)
    verdict = "within" if abs(difference) <= spread else "outside"
    slower = other.step_seconds / first.step_seconds - 1
    return [
        f"{other.name} against {first.name}, cross-entropy: {difference:+.4f} nats a byte; two standard errors over "
        f"{len(one.batches)} held-out batches are {spread:.4f}, so the difference is {verdict} what the choice of "
        "text explains. One seed each: the spread between seeds is not in that figure.",
        f"{other.name} against {first.name}, last hidden states: effective rank {two.effective_rank:.2f} against "
        f"{one.effective_rank:.2f} (ratio {two.effective_rank / one.effective_rank:.2f}; covariance eigenvalues, "
        f"centred, n = {two.rows:,}), mean pairwise cosine {two.mean_cosine:.4f} against {one.mean_cosine:.4f}. "
        "One seed each, no spread measured.",
        f"{other.name} against {first.name}, median step: {other.step_seconds * 1e3:.1f} ms against "
        f"{first.step_seconds * 1e3:.1f} ms ({slower:+.0%}); the middle half of the steps took {other.middle_half} "
        f"against {first.middle_half}.",
    ]


def _latent(look: HeldOut, number: Callable[[Latent], float]) -> str:
    return ", ".join(f"{number(latent):.4f}" for latent in look.latent.values()) or "-"


def head_table(costs: list[HeadCost]) -> Table:
    """Eager and fused side by side."""
    one = costs[0]
    title = f"output head, forward and backward, {one.rows} rows, d = {one.dim}, V = {one.vocab:,}, {one.dtype}"
    result = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for heading in ("", "peak memory, MiB", "seconds", "loss"):
        result.add_column(heading, justify="right" if heading else "left")
    for cost in costs:
        peak = f"{cost.peak_bytes / 2**20:,.0f}"
        result.add_row(cost.implementation, peak, f"{cost.seconds:.2f}", f"{cost.loss:.4f}")
    return result


def head_sentence(costs: list[HeadCost]) -> str:
    """The two ratios."""
    eager, fused = costs
    memory, seconds = fused.peak_bytes / eager.peak_bytes, fused.seconds / eager.seconds
    return (
        f"At V = {eager.vocab:,} the fused head peaks at {memory:.2f} x the memory of eager and takes "
        f"{seconds:.2f} x its time (gradients included, each in a fresh process, fastest of its passes)."
    )
