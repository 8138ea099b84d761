"""What is compared: the objectives that the user wrote, and the paper's control arms as one table
of specs."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.train.data import Corpus
from experiments.train.options import Options
from experiments.train.run import PROVIDED, Run, model_info
from nitp_ops.objectives import NITP, ModelInfo, Spec, SpecError, available, build
from nitp_ops.objectives import parse as parse_spec

DEFAULT_OBJECTIVES = ["ntp", "ntp + nitp"]


@dataclass(frozen=True)
class Control:
    """One row of the paper's ablations.

    `expression` may hold {layer} or {begin}: the paper's depth and start, scaled to the model and
    the run at hand.
    """

    name: str
    expression: str
    paper: float | None
    """The paper's mean score over five benchmarks, 3B mixture of experts, one seed; None where it gives none."""
    tests: str
    depth: float | None = None
    """Target layer as a fraction of the blocks: the paper's layer of its 17."""
    start: float | None = None
    """First step of the weight as a fraction of the run. The fractions are ours: the paper gives 1000, 2000, 3000."""
    needs: str = "nitp"
    """The objective that must be registered."""


BASELINE, DEFAULT = "ntp", "nitp"
SWEEP = "target layer {layer}"
LATE = "from step {begin}"
AT_LAYER = "ntp + nitp(target_layer={layer})"
FROM_STEP = "ntp + schedule(to=1.0, begin={begin})*nitp"
CONTROLS = (
    Control(BASELINE, "ntp", 21.10, "the baseline, next tokens alone"),
    Control(
        DEFAULT, "ntp + nitp", 23.58, "the default: cosine, target after a fifth of the blocks"
    ),
    Control(SWEEP, AT_LAYER, 20.72, "the embedding as target", depth=0 / 17),
    Control(SWEEP, AT_LAYER, 22.01, "a target below the default", depth=2 / 17),
    Control(SWEEP, AT_LAYER, 22.12, "a target above the default", depth=6 / 17),
    Control(SWEEP, AT_LAYER, 21.22, "a target near the middle", depth=8 / 17),
    Control(SWEEP, AT_LAYER, 22.16, "a target near the end", depth=14 / 17),
    Control(
        "same position",
        "ntp + nitp(shift=0)",
        18.75,
        "nothing to predict: the target is the token just read",
    ),
    Control("mse", "ntp + nitp(distance=mse)", 19.38, "lengths count, large ones most"),
    Control("smooth-L1", "ntp + nitp(distance=smooth_l1)", 23.24, "lengths count, large ones less"),
    Control("kl", "ntp + nitp(distance=kl)", 22.88, "features as a distribution"),
    Control(
        "no stop-gradient",
        "ntp + nitp(stop_gradient=False)",
        18.23,
        "the target may move to the prediction",
    ),
    Control(
        "no projector", "ntp + nitp(projector=none)", 20.64, "the hidden state itself must match"
    ),
    Control(
        "linear projector",
        "ntp + nitp(projector=linear)",
        None,
        "a projector without a nonlinearity",
    ),
    Control(LATE, FROM_STEP, 21.22, "the first steps without", start=1 / 8),
    Control(LATE, FROM_STEP, 21.40, "the first steps without", start=1 / 4),
    Control(LATE, FROM_STEP, 20.17, "the first steps without", start=3 / 8),
    Control(
        "cosine regulariser",
        "ntp + cosine_regularizer",
        20.79,
        "apart, but towards no target",
        needs="cosine_regularizer",
    ),
)


@dataclass(frozen=True)
class Arm:
    """An objective under the name that it has in tables, curves and on the disk."""

    name: str
    expression: str
    spec: Spec
    folder: str
    tests: str = ""
    paper: float | None = None

    def run(self, options: Options, corpus: Corpus) -> Run:
        """Its run with the seed of the options."""
        name = self.name if len(options.seeds) == 1 else f"{self.name}, seed {options.seed}"
        return Run(name, self.spec, options, corpus, self.run_folder(options))

    def run_folder(self, options: Options) -> Path:
        """Where the run with the seed of the options goes: one level deeper where there are several
        seeds."""
        folder = options.out / self.folder
        return folder if len(options.seeds) == 1 else folder / f"seed-{options.seed}"


def control_arms(info: ModelInfo, steps: int) -> list[Arm]:
    """The control table for a model of that depth and a run of that length.

    Rows that fall on one block, or on one step, are one arm with the score of the last, whose depth
    is the nearest; the default's own block and start are left to the default. Rows whose objective
    is not registered are left out.
    """
    default = NITP().layer(info)
    arms: dict[str, Arm] = {}
    for row in CONTROLS:
        layer = (
            default
            if row.depth is None
            else (NITP(target_layer=row.depth).layer(info) if row.depth else 0)
        )
        begin = round((row.start or 0) * steps)
        if (
            row.needs not in available()
            or (row.depth is not None and layer == default)
            or (row.start and not begin)
        ):
            continue
        name, expression = (
            text.format(layer=layer, begin=begin) for text in (row.name, row.expression)
        )
        arms[name] = Arm(name, expression, parse_spec(expression), slug(name), row.tests, row.paper)
    return list(arms.values())


def arms_of(options: Options) -> list[Arm]:
    """The control table if asked for, then the objectives that it does not hold already.

    Raises:
        SpecError: what this model cannot serve, with the expression before each problem, all of
            them.
    """
    arms = control_arms(model_info(options.model), options.steps) if options.controls else []
    expressions = options.objectives or ([] if options.controls else DEFAULT_OBJECTIVES)
    found: list[str] = []
    for expression in expressions:
        try:
            check(spec := parse_spec(expression), options)
        except SpecError as error:
            found += [f'--objectives "{expression}": {problem}' for problem in error.problems]
            continue
        if not options.controls or all(arm.spec != spec for arm in arms):
            arms.append(
                Arm(expression, expression, spec, folder_of(spec, {arm.folder for arm in arms}))
            )
    if found:
        raise SpecError(found)
    return arms


def check(spec: Spec, options: Options) -> None:
    """Refuse, before anything trains, what this model cannot serve.

    Raises:
        SpecError: options outside the model, or a stream that a plain decoder does not have.
    """
    with torch.device("meta"):
        objective = build(spec, model=model_info(options.model))
    missing = sorted(str(need) for need in objective.requires if need.stream not in PROVIDED)
    if missing:
        raise SpecError([f"it needs {', '.join(missing)}, which this decoder does not provide"])


def folder_of(spec: Spec, taken: Collection[str]) -> str:
    """The labels, joined; a number follows where that name is taken."""
    plain = "-".join(str(term.label) for term in spec.terms)
    names = [plain, *(f"{plain}.{number}" for number in range(2, len(taken) + 2))]
    return next(name for name in names if name not in taken)


def slug(name: str) -> str:
    """A name as a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())
