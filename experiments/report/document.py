"""docs/experiments.md: every table a loop over specs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import storage
from experiments.analysis.arms import Arm
from experiments.analysis.overhead import Overhead, overhead_table
from experiments.analysis.results import QUALITY, Result
from experiments.analysis.statistics import no_verdict
from experiments.train.data import Corpus
from experiments.train.options import Options

from . import figures, hypotheses, table

INTRODUCTION = """\
The control arms of next implicit token prediction ([arXiv 2605.24956](https://arxiv.org/abs/2605.24956)) as small runs
on real text. Written by the command below: no number in it was typed by hand."""
READING = """\
Effective rank: `exp(-sum p ln p)`, p = eigenvalues of the mean-centred covariance of the last hidden states after the
final norm, over their sum. Mean pairwise cosine: of the same states, all pairs. Skill = 1 - loss / constant-predictor
loss; "-" where the distance is not the cosine or that loss is below 1e-4. Losses and lengths belong to each arm's own
target: they compare only where targets do. Probes: ridge regression to one-hot tokens,
and the vote of the 16 nearest states, fitted and tested on different windows of text that training never saw. ± is one
standard deviation over seeds, or what the table says; differences are paired: one seed gives all arms
the same first weights and the same data order."""


def write(
    path: Path,
    options: Options,
    corpus: Corpus,
    arms: Sequence[Arm],
    results: Sequence[Result],
    failures: Sequence[dict[str, Any]],
    overheads: list[Overhead],
    facts: Sequence[str],
) -> None:
    """Write the document and, beside it, its figure.

    Args:
        arms: all that were to run; results: those that finished; failures: the records of those
            that could not.
        facts: command line, machine and time, one each.

    Raises:
        OSError: the disk refused; an older document is intact.
    """
    budget = (
        f"{len(arms)} arms x {len(options.seeds)} seeds x {options.steps:,} steps x "
        f"{options.tokens_per_step:,} tokens; width {options.dim}, {options.layers} blocks, "
        f"{options.heads} heads, context {options.context}, learning rate {options.lr:g}, "
        f"{options.dtype}"
    )
    lines = ["# Experiments", "", INTRODUCTION, ""]
    lines += [f"* {fact}" for fact in (*facts, f"budget: {budget}", f"text: {corpus.description}")]
    lines += ["", "## The arms", "", hypotheses.NOT_MEASURED, "", table.plan(arms).as_markdown()]
    done = len(results) + len(failures)
    if done < len(arms) * len(options.seeds):
        lines += [
            "",
            f"**Incomplete: {done} of {len(arms) * len(options.seeds)} runs are finished.**",
        ]
    lines += [f"* {record['failure']}" for record in failures]
    if results:
        lines += _results(path, table.by_arm(results))
    if overheads:
        lines += _overhead(overheads)
    storage.write(path, "\n".join(lines) + "\n")


def _results(path: Path, arms: list[list[Result]]) -> list[str]:
    lines = [
        "",
        "## Results",
        "",
        READING,
        "",
        table.measured(arms, QUALITY, wide=True).as_markdown(),
    ]
    if len(arms) > 1:
        image = path.with_suffix(".png")
        figures.differences(image, arms)
        lines += [
            "",
            hypotheses.differences(arms, wide=True).as_markdown(),
            "",
            *_why_no_verdict(arms),
        ]
        lines += [f"![differences from the first arm]({image.name})"]
    lines += ["", table.probes(arms, wide=True).as_markdown()]
    if measured := hypotheses.found(arms):
        lines += [
            "",
            "## What the paper and a first trial say",
            "",
            hypotheses.table_of(measured).as_markdown(),
        ]
    return lines


def _why_no_verdict(arms: list[list[Result]]) -> list[str]:
    said = no_verdict(min(map(len, arms)))
    return [said, ""] if said else []


def _overhead(overheads: list[Overhead]) -> list[str]:
    one = overheads[0]
    setting = (
        f"{len(one.plain)} rounds in one process, each round a step of every run, {one.layers} "
        f"blocks, V = {one.vocab}, {one.tokens:,} tokens per step; forward, backward, clipping and "
        "optimizer included."
    )
    return [
        "",
        "## What it costs: whole-step overhead",
        "",
        setting,
        "",
        overhead_table(overheads).as_markdown(),
    ]
