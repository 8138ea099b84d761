"""The arms on each text with equal tokens and with equal time: measured once, kept, written as a
page."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.measure.timing import interleave, ratios
from benchmarks.report.environment import here, machine_line
from nitp_ops.objectives import parse as parse_spec

from .analysis.arms import Arm
from .analysis.records import Records
from .comparison import terminal, train_shown
from .console.command import command_line
from .console.lock import alone_in
from .report import evidence_page
from .train.checkpoint import read_table, remove_checkpoints
from .train.data import Corpus, load_corpus
from .train.loop import prepare
from .train.options import Options, options_of, training_parser, whole
from .train.run import Run

ARMS = {
    "ntp": "ntp",
    "nitp": "ntp + nitp",
    "mtp": "ntp + 0.3*mtp_parallel(offsets=[2, 3], heads=residual)",
}
BASELINE = "ntp"
TOKENS, TIME = "equal tokens", "equal time"
#: Of the second text, where it lies beside the checkout.
TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "gutenberg"
#: Interleaved steps that the ratio of the step times is taken from; the first is left out.
ROUNDS = 13


@dataclass(frozen=True)
class Plan:
    """What to train and where to write it."""

    options: Options
    texts: list[Path | None]
    page: Path
    write_only: bool
    rounds: int


def parse(arguments: list[str] | None) -> Plan:
    """The plan of a command line.

    Raises:
        BadInput: an unknown option, a value out of range, shapes that do not fit, no CUDA device.
    """
    purpose = (
        "Train three objectives on two texts with equal tokens and equal time; write the page."
    )
    parser = training_parser("evidence", purpose, "runs/evidence")
    add = parser.add_argument
    default = ["-", *([str(TEXT)] if TEXT.exists() else [])]
    add(
        "--texts",
        nargs="+",
        default=default,
        metavar="FILE|DIR|-",
        help='texts; "-": the sources of Python\'s library',
    )
    add("--page", type=Path, default=Path("docs/evidence.md"), metavar="FILE", help="what to write")
    add(
        "--rounds",
        type=whole(2),
        default=ROUNDS,
        help="interleaved steps for the ratio of the step times",
    )
    add("--write-only", action="store_true", help="train nothing: write the page from the records")
    parser.set_defaults(steps=240, batch=8, seeds=[0, 1], eval_every=40)
    values = vars(parser.parse_args(arguments))
    own = {name: values.pop(name) for name in ("page", "rounds", "write_only")}
    texts = [None if text == "-" else Path(text) for text in values.pop("texts")]
    values |= {
        "objectives": None,
        "controls": False,
        "resume": True,
        "keep_heads": False,
        "fused_head": False,
    }
    return Plan(options_of(values), texts, **own)


def gather(plan: Plan) -> None:
    """Train what is not trained yet, then write the page from everything that is."""
    options = plan.options
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = {
        f"--{name.replace('_', '-')}": x
        for name, x in options.trajectory().items()
        if name != "seed"
    }
    settings |= {"--eval-windows": options.eval_windows, "device": options.device}
    corpora = [
        load_corpus(text, options.context, options.batch * options.accumulate)
        for text in plan.texts
    ]
    with alone_in(options.out):
        _gather(plan, corpora, Records(options.out / "records.jsonl", settings))


def _gather(plan: Plan, corpora: list[Corpus], records: Records) -> None:
    options, console, start = plan.options, terminal(), time.perf_counter()
    if not plan.write_only:
        for corpus in corpora:
            console.print(corpus.description)
            for name, steps in _budgets(plan, corpus, records).items():
                for seed in options.seeds:
                    for budget, count in steps.items():
                        _train(
                            name,
                            budget,
                            replace(options, steps=count, seed=seed),
                            corpus,
                            records,
                            console,
                        )
        said = {"command": command_line(), "machine": machine_line(here(options.device))}
        records.add(
            experiment="session",
            trained=len(_of(records, experiment="run")),
            seconds=time.perf_counter() - start,
            **said,
        )
    sessions = {
        line["trained"]: line for line in reversed(_of(records, experiment="session"))
    }.values()
    facts = [
        *(f"command: `{each}`" for each in dict.fromkeys(line["command"] for line in sessions)),
        *(f"machine: {each}" for each in dict.fromkeys(line["machine"] for line in sessions)),
        f"time: {sum(line['seconds'] for line in sessions) / 60:.1f} minutes, evaluation included",
        f"budget: {options.steps} steps of {options.tokens_per_step:,} tokens, seeds "
        f"{', '.join(map(str, options.seeds))}; width {options.dim}, {options.layers} blocks, "
        f"context {options.context}, learning rate {options.lr:g}, {options.dtype}, bytes as "
        "tokens",
    ]
    found = {
        _title(text, corpus): _of(records, experiment="run", text=corpus.fingerprint)
        for text, corpus in zip(plan.texts, corpora, strict=True)
    }
    evidence_page.write(plan.page, {text: lines for text, lines in found.items() if lines}, facts)
    console.print(f"\nwritten: {plan.page}")


def _title(text: Path | None, corpus: Corpus) -> str:
    """What the text is, without the folders that it lies in."""
    return corpus.description.replace(str(text), text.name, 1) if text else corpus.description


def _of(records: Records, **key: Any) -> list[dict[str, Any]]:
    return [line for line in records.lines if key.items() <= line.items()]


def _budgets(plan: Plan, corpus: Corpus, records: Records) -> dict[str, dict[str, int]]:
    """The steps of each arm: as many as the baseline's, and as many as fit into the baseline's
    time."""
    key = {"experiment": "speed", "text": corpus.fingerprint}
    line = records.find(**key)
    if line is None:
        records.add(**key, ratios=_ratios(plan.options, corpus, plan.rounds))
        line = records.lines[-1]
    most = plan.options.steps
    steps = {
        name: {TOKENS: most, TIME: max(1, round(most / ratio))}
        for name, ratio in line["ratios"].items()
    }
    return {name: each if name != BASELINE else {TOKENS: most} for name, each in steps.items()}


def _ratios(options: Options, corpus: Corpus, rounds: int) -> dict[str, float]:
    """The step time of each arm over the baseline's: medians of the ratios within rounds of
    interleaved steps."""
    short = replace(options, steps=rounds)
    steps = {name: _arm(name).run(short, corpus).step for name in ARMS}
    seconds = interleave(
        steps, lambda: None, rounds=rounds, seconds=math.inf, clock=time.perf_counter
    )
    base = seconds[BASELINE][1:]  # the first round pays what is paid once
    return {name: ratios(own[1:], base)["median"] for name, own in seconds.items()}


def _arm(name: str, folder: str | None = None) -> Arm:
    return Arm(name, ARMS[name], parse_spec(ARMS[name]), folder or name)


def _train(
    name: str, budget: str, options: Options, corpus: Corpus, records: Records, console: Console
) -> None:
    """One run, unless a record has it; a checkpoint continues."""
    key = {
        "experiment": "run",
        "text": corpus.fingerprint,
        "arm": name,
        "budget": budget,
        "seed": options.seed,
    }
    if records.find(**key, steps=options.steps):
        return
    folder = f"{corpus.fingerprint}/{re.sub(' ', '-', budget)}/{name}"
    run = _arm(name, folder).run(options, corpus)
    console.print(f"\n{budget}, {prepare(run, resume=True)}")
    final = train_shown(run, console)
    steps = read_table(run.folder / "steps.csv")
    seconds = [float(row["seconds"]) for row in steps]
    records.add(
        **key,
        expression=ARMS[name],
        steps=options.steps,
        tokens=options.steps * options.tokens_per_step,
        seconds=sum(seconds),
        cross_entropy=final.cross_entropy,
        effective_rank=final.effective_rank,
        mean_cosine=final.mean_cosine,
        curve=_curve(run, seconds),
    )
    remove_checkpoints(run.checkpoint)


def _curve(run: Run, seconds: Sequence[float]) -> list[list[float]]:
    """[tokens, seconds of training, held-out cross-entropy] at each look."""
    looks = read_table(run.folder / "validation.csv")
    per_step = run.options.tokens_per_step
    points = [(int(row["step"]), float(row["cross_entropy"])) for row in looks]
    return [[step * per_step, sum(seconds[:step]), value] for step, value in points]
