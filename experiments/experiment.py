"""The experiments: control arms over several seeds and the whole-step overhead, each measured once
and kept."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.report.environment import here, machine_line

from .analysis import overhead
from .analysis.arms import Arm, control_arms
from .analysis.records import Records, result_of, result_record
from .analysis.results import Result
from .comparison import terminal, train_shown
from .console.command import command_line
from .console.failure import Diverged
from .console.lock import alone_in
from .report import document, figures, page, table
from .train.checkpoint import remove_checkpoints
from .train.data import Corpus, load_corpus
from .train.loop import prepare
from .train.options import Options, options_of, training_parser, whole
from .train.run import backend_for, model_info

EXPERIMENTS = ("arms", "overhead")
ROUNDS = 9
"""Of the overhead: few enough that a step at the largest width may take seconds."""


@dataclass(frozen=True)
class Plan:
    """What to measure and where to write it."""

    options: Options
    experiments: list[str]
    document: Path
    rounds: int
    dims: list[int]


def parse(arguments: list[str] | None) -> Plan:
    """The plan of a command line.

    Raises:
        BadInput: an unknown option, a value out of range, shapes that do not fit, no CUDA device.
    """
    purpose = "Measure the control arms and the overhead of the objective; write the document."
    parser = training_parser("ablations", purpose, "runs/ablations")
    add = parser.add_argument
    chosen = {"choices": EXPERIMENTS, "default": list(EXPERIMENTS)}
    add("--experiments", nargs="*", help="what to measure; none: only write", **chosen)
    add(
        "--document",
        type=Path,
        default=Path("docs/experiments.md"),
        metavar="FILE",
        help="what to write",
    )
    add("--rounds", type=whole(2), default=ROUNDS, help="rounds of the overhead")
    add(
        "--overhead-dims",
        nargs="+",
        type=whole(1),
        default=list(overhead.DIMS),
        help="widths of the overhead",
    )
    parser.set_defaults(steps=800, batch=8, seeds=[0, 1, 2], eval_every=100)
    values = vars(parser.parse_args(arguments))
    own = {name: values.pop(name) for name in ("experiments", "document", "rounds")}
    dims = values.pop("overhead_dims")
    values |= {
        "objectives": None,
        "controls": True,
        "resume": True,
        "keep_heads": False,
        "fused_head": False,
    }
    return Plan(options_of(values), dims=dims, **own)


def experiment(plan: Plan) -> None:
    """Measure what is not measured yet, then write document and page from everything that is."""
    options, console = plan.options, terminal()
    if options.threads:
        torch.set_num_threads(options.threads)
    corpus = load_corpus(options.data, options.context, options.batch * options.accumulate)
    settings = {
        f"--{name.replace('_', '-')}": x
        for name, x in options.trajectory().items()
        if name != "seed"
    }
    settings |= {
        "--eval-windows": options.eval_windows,
        "device": options.device,
        "the text": corpus.fingerprint,
    }
    with alone_in(options.out):
        _experiment(plan, corpus, Records(options.out / "records.jsonl", settings), console)


def _experiment(plan: Plan, corpus: Corpus, records: Records, console: Console) -> None:
    options = plan.options
    arms = control_arms(model_info(options.model), options.steps)
    if "arms" in plan.experiments:
        for seed in options.seeds:
            for arm in arms:
                _arm(arm, options.of_seed(seed), corpus, records, console)
    if "overhead" in plan.experiments:
        _overheads(plan, corpus, records, console)
    _write(plan, arms, corpus, records, console)


def _arm(arm: Arm, options: Options, corpus: Corpus, records: Records, console: Console) -> None:
    """Train and measure one arm from one seed, unless a record has it; a checkpoint continues."""
    key = {
        "experiment": "arms",
        "arm": arm.name,
        "expression": arm.expression,
        "seed": options.seed,
    }
    if records.find(**key):
        return
    start = time.perf_counter()
    run = arm.run(options, corpus)
    console.print(f"\n{prepare(run, resume=True)}")
    common = {"machine": machine_line(here(options.device))}
    try:
        result = Result.of(arm, run, train_shown(run, console))
    except Diverged as error:
        records.add(**key, failure=str(error), **common)
        console.print(str(error))
    else:
        records.add(**key, **result_record(result), seconds=time.perf_counter() - start, **common)
    # Only a run that is not finished needs its checkpoint, and some fifty would fill the disk.
    remove_checkpoints(run.checkpoint)


def _overheads(plan: Plan, corpus: Corpus, records: Records, console: Console) -> None:
    """Step times at each width, unless a record has them."""
    backends = (
        list(overhead.BACKENDS) if backend_for(plan.options.device) is None else ["reference"]
    )
    for dim in plan.dims:
        if all(
            records.find(experiment="overhead", dim=dim, backend=backend) for backend in backends
        ):
            continue
        start = time.perf_counter()
        for result in overhead.measure(
            dim, plan.options, corpus, plan.rounds, backends, console.print
        ):
            seconds = (time.perf_counter() - start) / len(backends)
            common = {"machine": machine_line(here(plan.options.device))}
            records.add(**overhead.record(result), seconds=seconds, **common)


def _write(plan: Plan, arms: list[Arm], corpus: Corpus, records: Records, console: Console) -> None:
    """Document and page."""
    options = plan.options
    found = [
        (arm, records.find(experiment="arms", expression=arm.expression, seed=s))
        for arm in arms
        for s in options.seeds
    ]
    results = [
        result_of(x, arm, options) for arm, x in found if x is not None and "failure" not in x
    ]
    failures = [x for _, x in found if x is not None and "failure" in x]
    costs = {(x["dim"], x["backend"]): x for x in records.lines if x["experiment"] == "overhead"}
    overheads = [overhead.from_record(x) for x in costs.values()]
    measured = [*(x for _, x in found if x is not None), *costs.values()]
    minutes = sum(x.get("seconds", 0.0) for x in measured) / 60
    machines = dict.fromkeys(x["machine"] for x in measured)
    facts = [
        f"command: `{command_line()}`",
        *(f"machine: {machine}" for machine in machines),
        f"time: {minutes:.1f} minutes of measuring (of an arm that was stopped, the part after "
        "its restart)",
    ]
    document.write(plan.document, options, corpus, arms, results, failures, overheads, facts)
    console.print(f"\nwritten: {plan.document}")
    if results:
        report, groups = options.out / "report.html", table.by_arm(results)
        page.write(
            report,
            options,
            corpus,
            groups,
            [],
            figures.draw(options.out / "comparison.png", groups, []),
        )
        console.print(f"everything on one page: {report}")
