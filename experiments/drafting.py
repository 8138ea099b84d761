"""Drafting, shown: train small models with heads, decode held-out text plain and drafted, say what
was saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.report.tables import Table
from nitp_ops.objectives import CompositeObjective

from .analysis.arms import Arm, arms_of
from .comparison import terminal, train_shown
from .console.failure import BadInput
from .console.lock import alone_in
from .report.table import for_terminal
from .train.data import Corpus, load_corpus
from .train.decoding import Comparison, compare
from .train.heads import load_exported
from .train.loop import prepare
from .train.options import Options, options_of, training_parser, whole

OBJECTIVES = [
    "ntp + 0.3*mtp_shared(offsets=[2, 3])",
    "ntp + mtp_parallel",
    "ntp + mtp_sequential(depth=3)",
]


@dataclass(frozen=True)
class Plan:
    """What to train, or which exported runs to read, and what to decode."""

    options: Options
    folders: list[Path]
    prompts: int
    prompt_tokens: int
    new_tokens: int


def parse(arguments: list[str] | None) -> Plan:
    """The plan of a command line.

    Raises:
        BadInput: an unknown option, a value out of range, shapes that do not fit, more tokens than
            the context holds.
    """
    parser = training_parser(
        "draft", "Decode with the heads of multi-token objectives.", "runs/draft"
    )
    add = parser.add_argument
    add("--objectives", nargs="+", metavar="EXPRESSION", default=OBJECTIVES, help="a model each")
    add(
        "--from",
        dest="folders",
        nargs="+",
        type=Path,
        default=[],
        metavar="DIR",
        help="exported runs: train nothing",
    )
    add(
        "--prompts",
        type=whole(1),
        default=12,
        help="held-out windows whose first tokens are continued",
    )
    add("--prompt-tokens", type=whole(1), default=32, help="tokens of a prompt")
    add("--new-tokens", type=whole(1), default=128, help="tokens to decode")
    # many thin blocks: an own head is one block beside them, as in a real model
    parser.set_defaults(
        steps=250, dim=96, layers=8, context=192, batch=8, eval_every=125, eval_windows=32
    )
    values = vars(parser.parse_args(arguments))
    own = {name: values.pop(name) for name in ("folders", "prompts", "prompt_tokens", "new_tokens")}
    values |= {"controls": False, "resume": True, "keep_heads": True, "fused_head": False}
    options = options_of(values)
    if len(options.seeds) > 1:
        raise BadInput(f"--seeds {' '.join(map(str, options.seeds))}: expected one seed")
    return Plan(options, **own)


def demonstrate(plan: Plan) -> None:
    """Train what is to be trained, decode from the exported files, print the table."""
    options, console = plan.options, terminal()
    if options.threads:
        torch.set_num_threads(options.threads)
    corpus = load_corpus(options.data, options.context, options.batch * options.accumulate)
    console.print(corpus.description)
    trained = [(str(folder), folder) for folder in plan.folders]
    if not plan.folders:
        _check_room(plan, options.context)
        with alone_in(options.out):
            trained = [_trained(arm, options, corpus, console) for arm in arms_of(options)]
    found = [_decoded(name, folder, plan, corpus) for name, folder in trained]
    console.print(for_terminal(table(found)))


def _trained(arm: Arm, options: Options, corpus: Corpus, console: Console) -> tuple[str, Path]:
    run = arm.run(options, corpus)
    _check_heads(run.objective, f'--objectives "{arm.expression}"')
    console.print(f"\n{prepare(run, resume=True)}")
    train_shown(run, console)
    return arm.name, run.folder


def _decoded(name: str, folder: Path, plan: Plan, corpus: Corpus) -> Comparison:
    model, objective = load_exported(folder)
    _check_heads(objective, str(folder))
    _check_room(plan, model.config.context)
    device = torch.device(plan.options.device)
    windows = torch.linspace(
        0, len(corpus.held_out) - 1, min(plan.prompts, len(corpus.held_out))
    ).long()
    tokens, _ = corpus.held_out.take(windows)
    prompts = list(tokens[:, : plan.prompt_tokens].to(device).split(1))
    return compare(name, model.to(device), objective.to(device), prompts, plan.new_tokens)


def _check_heads(objective: CompositeObjective, where: str) -> None:
    modules = dict(objective.terms.items())
    able = [
        x
        for x in objective.spec.terms
        if x.drafter(modules.get(str(x.label)), objective.info) is not None
    ]
    if len(able) != 1:
        names = ", ".join(str(term.label) for term in able) or "no term"
        raise BadInput(
            f"{where}: {names} can draft, expected one mtp_shared, mtp_parallel or mtp_sequential"
        )


def _check_room(plan: Plan, context: int) -> None:
    if (wanted := plan.prompt_tokens + plan.new_tokens) > context:
        raise BadInput(
            f"--prompt-tokens {plan.prompt_tokens} --new-tokens {plan.new_tokens}: {wanted} "
            f"tokens, expected at most the context of {context}"
        )


def table(found: Sequence[Comparison]) -> Table:
    """A column a model."""
    header = [
        "",
        "prompts with the text of plain decoding",
        "logit gap where they part",
        "calls of the model",
        "drafts accepted",
        "at each offset",
        "tokens a call",
        "plain, tokens/s",
        "drafted, tokens/s",
    ]
    rows = [
        [
            x.name,
            f"{len(x.drafts) - len(x.parted)} of {len(x.drafts)}",
            f"{max(abs(gap) for _, gap in x.parted):.1e}" if x.parted else "-",
            f"{sum(draft.calls for draft in x.drafts):,}",
            f"{x.accepted:.3f}",
            ", ".join(f"{share:.3f}" for share in x.acceptance),
            f"{x.tokens_per_call:.2f}",
            f"{x.new_tokens / sum(x.plain_seconds):,.0f}",
            f"{x.new_tokens / sum(x.drafted_seconds):,.0f}",
            f"{x.speed_up:.2f}",
        ]
        for x in found
    ]
    drafts = found[0].drafts
    title = (
        f"greedy decoding of {len(drafts)} held-out prompts, {drafts[0].new_tokens} new tokens each"
    )
    return Table(title, [*header, "speed-up, median"], rows).transposed()
