"""The comparison itself: every arm from every seed, then tables, figure, page."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .analysis.arms import Arm, arms_of
from .analysis.fused_head import HeadCost
from .analysis.fused_head import compare as compare_heads
from .analysis.results import BRIEF, COST, QUALITY, Result
from .analysis.statistics import no_verdict
from .console.failure import BadInput, Failure
from .console.lock import alone_in
from .report import figures, hypotheses, page, table
from .train.checkpoint import load_checkpoint, stored_checkpoint
from .train.data import Corpus, load_corpus
from .train.evaluate import HeldOut
from .train.loop import prepare, train
from .train.options import Options
from .train.run import Run, backend_for, refuse_another_run

HEAD_SHAPE = {"rows": 1024, "dim": 256, "vocab": 151_936, "dtype": "float32"}


def compare(options: Options) -> None:
    """One run for each objective and seed, then what they say."""
    if options.threads:
        torch.set_num_threads(options.threads)
    console = terminal()
    arms = arms_of(options)
    corpus = load_corpus(options.data, options.context, options.batch * options.accumulate)
    if options.resume:
        check_resumable(options, corpus, arms)
    with alone_in(options.out):
        _compare(options, console, arms, corpus)


def _compare(options: Options, console: Console, arms: list[Arm], corpus: Corpus) -> None:
    console.print(corpus.description)
    if backend_for(options.device) is not None:
        console.print(
            f"no row kernels serve {options.device} here: the objectives run as plain PyTorch "
            "equations"
        )
    few = len(arms) <= table.WIDE
    if not few:
        console.print(table.for_terminal(table.plan(arms)))
        console.print(hypotheses.NOT_MEASURED)
    results = []
    for seed in options.seeds:
        for arm in arms:
            run = arm.run(options.of_seed(seed), corpus)
            console.print(f"\n{prepare(run, options.resume)}")
            if few and seed == options.seeds[0]:
                console.print(run.objective.explain())
            results.append(Result.of(arm, run, train_shown(run, console)))
    groups = table.by_arm(results)
    console.print(table.for_terminal(table.measured(groups, (*QUALITY, *COST) if few else BRIEF)))
    if few:
        console.print(table.for_terminal(table.probes(groups)))
        for group in groups:
            console.print(f"sampled from {group[0].arm.name}:\n{group[0].sample}\n")
    if len(groups) > 1:
        console.print(table.for_terminal(hypotheses.differences(groups)))
        console.print(*filter(None, [no_verdict(min(map(len, groups)))]))
    costs, failure = _head_costs(options, console) if options.fused_head else ([], None)
    image, report = options.out / "comparison.png", options.out / "report.html"
    page.write(report, options, corpus, groups, costs, figures.draw(image, groups, costs))
    console.print(
        f"\ncurves: {image}; everything on one page: {report}; tables and weights: "
        f"{options.out}/<objective>/"
    )
    if failure is not None:
        raise failure


def terminal() -> Console:
    """Where a command prints: plain text, nothing reinterpreted."""
    # The file by name: rich asks no other for its encoding.
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)


def check_resumable(options: Options, corpus: Corpus, arms: list[Arm]) -> None:
    """Refuse to resume, before anything trains, where a checkpoint is missing, damaged or of
    another run."""
    runs = [(arm, options.of_seed(seed)) for arm in arms for seed in options.seeds]
    paths = [(arm, own, arm.run_folder(own) / "checkpoint.pt") for arm, own in runs]
    stored = [(arm, own, stored_checkpoint(path)) for arm, own, path in paths]
    if not any(path for _, _, path in stored):
        names = " or ".join(arm.folder for arm in arms)
        raise BadInput(f"--resume: {options.out} holds no checkpoint of {names}; start without it")
    for arm, own, path in stored:
        if path is not None:
            refuse_another_run(path, load_checkpoint(path), arm.spec, own, corpus)


def train_shown(run: Run, console: Console) -> HeldOut:
    """Take the remaining steps under a progress bar (none where the output is no terminal), each
    look a line."""
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
    ]
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(run.name, total=run.options.steps, completed=run.done, loss="-")

        def on_step(row: dict[str, float]) -> None:
            progress.update(task, advance=1, loss=f"{row['loss']:.3f}")

        return train(run, on_step, _looker(progress.console.print))


def _looker(show: Callable[[str], None]) -> Callable[[HeldOut], None]:
    def on_look(look: HeldOut) -> None:
        latent = ""
        for label, (loss, constant, _) in look.latent.items():
            latent += f"  {label} {loss:.4f}" + (
                "" if math.isnan(constant) else f" (constant predictor {constant:.4f})"
            )
        show(
            f"step {look.step:>5}  held-out cross-entropy {look.cross_entropy:.4f}{latent}"
            f"  effective rank {look.effective_rank:.1f}  mean cosine {look.mean_cosine:.3f}"
        )

    return on_look


def _head_costs(options: Options, console: Console) -> tuple[list[HeadCost], Failure | None]:
    """The costs, or why there are none: the report of what was trained is written all the same."""
    try:
        device = options.device if backend_for(options.device) is None else "cpu"
        costs = compare_heads(**HEAD_SHAPE, device=device, threads=torch.get_num_threads())
    except RuntimeError as error:
        return [], Failure(str(error))
    console.print(table.for_terminal(table.head_table(costs)))
    return costs, None
