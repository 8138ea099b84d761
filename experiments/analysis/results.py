"""What a finished run leaves for tables: flat numbers, the curves on the disk, a little text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from experiments.train.checkpoint import read_table
from experiments.train.evaluate import HeldOut, latent_labels
from experiments.train.run import Run

from .arms import Arm
from .probing import probe
from .statistics import Difference

PROMPT = b"\n"
SAMPLE_BYTES = 160


@dataclass(frozen=True)
class Result:
    """A finished run of one arm from one seed."""

    arm: Arm
    seed: int
    numbers: dict[str, float]
    """Of the last look at held-out text, of the probes, of the steps."""
    batches: list[float]
    """Cross-entropy of each held-out batch: equal windows in every run."""
    steps: list[dict[str, str]] = field(default_factory=list)
    """The rows of steps.csv."""
    looks: list[dict[str, str]] = field(default_factory=list)
    """The rows of validation.csv."""
    sample: str = ""
    """Text that the model continues by itself."""

    @classmethod
    def of(cls, arm: Arm, run: Run, final: HeldOut) -> Result:
        """Measure what a trained run still has to tell."""
        steps = read_table(run.folder / "steps.csv")
        # A run whose table was lost has no times, and everything else.
        times = [float(row["seconds"]) for row in steps] or [math.nan]
        seconds = torch.tensor(times, dtype=torch.float64)
        quartiles = seconds.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        latent = {
            f"{label}/{name}": x
            for label, y in final.latent.items()
            for name, x in y._asdict().items()
        }
        norms = {name: x for name, x in final.metrics.items() if name.endswith("_norm")}
        numbers = {
            "cross_entropy": final.cross_entropy,
            **latent,
            **norms,
            "effective_rank": final.effective_rank,
            "mean_cosine": final.mean_cosine,
            "rows": final.rows,
            "parameters": sum(p.numel() for p in run.model.parameters()),
            "own_parameters": sum(p.numel() for p in run.objective.parameters()),
            "tokens_per_step": run.options.tokens_per_step,
            **dict(zip(("step_low", "step_seconds", "step_high"), quartiles, strict=True)),
            **probe(run),
        }
        looks = read_table(run.folder / "validation.csv")
        return cls(arm, run.options.seed, numbers, final.batches, steps, looks, sample(run))

    @property
    def labels(self) -> list[str]:
        """The latent terms."""
        return latent_labels(self.arm.spec)


@dataclass(frozen=True)
class Measure:
    """A number of a run, with its name and how it is written."""

    title: str
    form: str
    values: Callable[[Result], list[float]]
    """One number, or one for each latent term."""


def number(title: str, form: str, key: str) -> Measure:
    """A number that every run has."""
    return Measure(title, form, lambda result: [result.numbers[key]])


def latent(title: str, form: str, key: str) -> Measure:
    """A number of each latent term."""
    return Measure(
        title, form, lambda o: [o.numbers.get(f"{label}/{key}", float("nan")) for label in o.labels]
    )


CROSS_ENTROPY = number("cross-entropy, nats a byte", ".4f", "cross_entropy")
LOSS = latent("latent-term loss", ".4f", "loss")
FLOOR = latent("constant-predictor loss", ".4f", "constant_predictor_loss")
SKILL = latent("skill", ".4f", "skill")
PREDICTION_NORM = latent("|P(h)|", ".3f", "prediction_norm")
TARGET_NORM = latent("|z|", ".3f", "target_norm")
RANK = number("effective rank", ".2f", "effective_rank")
COSINE = number("mean pairwise cosine", ".4f", "mean_cosine")
PARAMETERS = number("parameters, exported", ",.0f", "parameters")
OWN_PARAMETERS = number("parameters, training only", ",.0f", "own_parameters")
STEP = Measure("median step, ms", ".1f", lambda result: [result.numbers["step_seconds"] * 1e3])
SPEED = Measure(
    "tokens a second", ",.0f", lambda o: [o.numbers["tokens_per_step"] / o.numbers["step_seconds"]]
)
QUALITY = (CROSS_ENTROPY, LOSS, FLOOR, SKILL, PREDICTION_NORM, TARGET_NORM, RANK, COSINE)
BRIEF = (CROSS_ENTROPY, LOSS, FLOOR, SKILL, RANK, COSINE)
COST = (PARAMETERS, OWN_PARAMETERS, STEP, SPEED)


def pairs(first: Sequence[Result], other: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Runs of the same seed."""
    return [(a, b) for a in first for b in other if a.seed == b.seed]


def difference(measure: Measure, paired: Sequence[tuple[Result, Result]]) -> Difference:
    """Of a measure that every run has one of: second less first."""
    return Difference.between(
        [measure.values(a)[0] for a, _ in paired], [measure.values(b)[0] for _, b in paired]
    )


def sample(run: Run) -> str:
    """A little text that the model continues by itself."""
    prompt = torch.tensor(list(PROMPT), device=run.device)
    tokens = run.model.sample(prompt, SAMPLE_BYTES, temperature=0.8, seed=run.options.seed)
    text = bytes(tokens.tolist()).decode("utf-8", errors="replace")
    # A young model emits escape sequences too: none of them may reach the terminal.
    return "".join(
        letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}"
        for letter in text
    )
