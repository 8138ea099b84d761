"""What the paper and a first trial say, beside the measured differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.report.tables import Table
from experiments.analysis.arms import BASELINE, DEFAULT
from experiments.analysis.probing import LINEAR, NEAREST
from experiments.analysis.results import (
    COSINE,
    CROSS_ENTROPY,
    FLOOR,
    LOSS,
    RANK,
    Measure,
    difference,
    pairs,
)
from experiments.analysis.statistics import Difference, shown_as

from .table import WIDE, Arms

NOT_MEASURED = (
    "The paper's scores are means over five downstream benchmarks of a 3B-parameter mixture of "
    "experts, one seed each. No benchmark is measured here: they stand beside the arms to name "
    "what each one controls for, not to be compared."
)
GAIN = Measure(
    "constant-predictor loss less loss",
    ".4f",
    lambda o: [
        o.numbers[f"{x}/constant_predictor_loss"] - o.numbers[f"{x}/loss"] for x in o.labels
    ],
)


@dataclass(frozen=True)
class Hypothesis:
    """That `arm` differs from `against` in `measure`, as the text says."""

    text: str
    source: str
    arm: str
    against: str | None
    """None: from zero."""
    measure: Measure


HYPOTHESES = (
    Hypothesis("nitp leaves the cross-entropy as it is", "paper", DEFAULT, BASELINE, CROSS_ENTROPY),
    Hypothesis("nitp raises the effective rank", "paper", DEFAULT, BASELINE, RANK),
    Hypothesis("nitp lowers the mean pairwise cosine", "paper", DEFAULT, BASELINE, COSINE),
    Hypothesis(
        "nitp learns more than the mean direction", "definition of skill", DEFAULT, None, GAIN
    ),
    Hypothesis(
        "at the same position the task is easy", "first trial", "same position", DEFAULT, LOSS
    ),
    Hypothesis(
        "without stop-gradient the target collapses",
        "first trial",
        "no stop-gradient",
        DEFAULT,
        FLOOR,
    ),
    Hypothesis(
        "without stop-gradient the cross-entropy rises",
        "first trial",
        "no stop-gradient",
        DEFAULT,
        CROSS_ENTROPY,
    ),
    Hypothesis(
        "without a projector hidden states align", "first trial", "no projector", DEFAULT, COSINE
    ),
)


def found(arms: Arms) -> list[tuple[Hypothesis, Difference]]:
    """Every hypothesis whose arms were run, with its difference; a measure that is NaN in one of
    them leaves it out."""
    by_name = {group[0].arm.name: group for group in arms}
    measured = []
    for hypothesis in HYPOTHESES:
        own, base = (
            by_name.get(hypothesis.arm, []),
            by_name.get(hypothesis.against or hypothesis.arm, []),
        )
        matched = pairs(base, own)
        other = [hypothesis.measure.values(b)[0] for _, b in matched]
        one = [hypothesis.measure.values(a)[0] if hypothesis.against else 0.0 for a, _ in matched]
        less = Difference.between(one, other)
        if matched and math.isfinite(less.mean):
            measured.append((hypothesis, less))
    return measured


def table_of(measured: Sequence[tuple[Hypothesis, Difference]]) -> Table:
    """The hypotheses and their differences."""
    rows = [
        [
            hypothesis.text,
            hypothesis.source,
            f"{hypothesis.measure.title}, {hypothesis.arm} - {hypothesis.against or '0'}",
            less.formatted(hypothesis.measure.form),
            less.verdict,
        ]
        for hypothesis, less in measured
    ]
    error = shown_as(min(less.pairs for _, less in measured))
    header = ["", "said by", "measured", f"difference ± {error}", "verdict"]
    return Table("what is said, and what was measured", header, rows)


def probe_measure(kind: str, offset: int) -> Measure:
    """The accuracy of a probe as a measure."""
    name = {LINEAR: "linear", NEAREST: "k-NN"}[kind]
    return Measure(
        f"{name}, j = {offset}", ".4f", lambda result: [result.numbers[f"{kind}/{offset}"]]
    )


COMPARED = (
    CROSS_ENTROPY,
    RANK,
    COSINE,
    *(probe_measure(kind, offset) for kind in (LINEAR, NEAREST) for offset in (1, 2, 4)),
)


def differences(arms: Arms, *, wide: bool = False) -> Table:
    """Each arm less the first: a column an arm where they are few, else (or if `wide`) a row."""
    first, *others = arms
    rows, fewest = [], len(first)
    for group in others:
        if matched := pairs(first, group):
            cells = (difference(measure, matched).formatted(measure.form) for measure in COMPARED)
            rows.append([group[0].arm.name, *cells])
            fewest = min(fewest, len(matched))
    title = f'less "{first[0].arm.name}", paired by seed, ± {shown_as(fewest)}'
    table = Table(title, ["", *(measure.title for measure in COMPARED)], rows)
    return table if wide or len(arms) > WIDE else table.transposed()
