"""What the paper and a first trial say, beside the measured differences. No verdict: the reader has the numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.report.tables import Table
from experiments.analysis.arms import BASELINE, DEFAULT
from experiments.analysis.probing import LINEAR, NEAREST
from experiments.analysis.results import COSINE, CROSS_ENTROPY, FLOOR, LOSS, RANK, Measure, difference, pairs
from experiments.analysis.statistics import Difference, shown_as

from .table import Arms

GAIN = Measure("floor less loss", ".4f", lambda o: [o.numbers[f"{x}/floor"] - o.numbers[f"{x}/loss"] for x in o.labels])


@dataclass(frozen=True)
class Claim:
    """That `arm` differs from `against` in `measure`, as the text says."""

    text: str
    source: str
    arm: str
    against: str | None
    """None: from zero."""
    measure: Measure


CLAIMS = (
    Claim("nitp leaves the cross-entropy as it is", "paper", DEFAULT, BASELINE, CROSS_ENTROPY),
    Claim("nitp raises the effective rank", "paper", DEFAULT, BASELINE, RANK),
    Claim("nitp lowers the mean pairwise cosine", "paper", DEFAULT, BASELINE, COSINE),
    Claim("nitp learns more than the mean direction", "definition of skill", DEFAULT, None, GAIN),
    Claim("at the same position the task is easy", "first trial", "same position", DEFAULT, LOSS),
    Claim("without stop-gradient the target collapses", "first trial", "no stop-gradient", DEFAULT, FLOOR),
    Claim("without stop-gradient the cross-entropy rises", "first trial", "no stop-gradient", DEFAULT, CROSS_ENTROPY),
    Claim("without a projector hidden states align", "first trial", "no projector", DEFAULT, COSINE),
)


def found(arms: Arms) -> list[tuple[Claim, Difference]]:
    """Every claim whose arms were run, with its difference; a measure that one of them lacks (NaN) leaves it out."""
    by_name = {group[0].arm.name: group for group in arms}
    measured = []
    for claim in CLAIMS:
        own, base = by_name.get(claim.arm, []), by_name.get(claim.against or claim.arm, [])
        matched = pairs(base, own)
        other = [claim.measure.values(b)[0] for _, b in matched]
        one = [claim.measure.values(a)[0] if claim.against else 0.0 for a, _ in matched]
        less = Difference.between(one, other)
        if matched and math.isfinite(less.mean):
            measured.append((claim, less))
    return measured


def table_of(measured: Sequence[tuple[Claim, Difference]]) -> Table:
    """The claims and their differences."""
    rows = [
        [
            claim.text,
            claim.source,
            f"{claim.measure.title}, {claim.arm} - {claim.against or '0'}",
            less.spelled(claim.measure.form),
        ]
        for claim, less in measured
    ]
    spread = shown_as(min(less.pairs for _, less in measured))
    return Table("what is said, and what was measured", ["", "said by", "measured", f"difference ± {spread}"], rows)


def probe_measure(kind: str, offset: int) -> Measure:
    """The accuracy of a probe as a measure."""
    name = {LINEAR: "linear", NEAREST: "k-NN"}[kind]
    return Measure(f"{name}, j = {offset}", ".4f", lambda outcome: [outcome.numbers[f"{kind}/{offset}"]])


COMPARED = (
    CROSS_ENTROPY,
    RANK,
    COSINE,
    *(probe_measure(kind, offset) for kind in (LINEAR, NEAREST) for offset in (1, 2, 4)),
)


def differences(arms: Arms) -> Table:
    """Each arm less the first."""
    first, *others = arms
    rows, fewest = [], len(first)
    for group in others:
        if matched := pairs(first, group):
            cells = (difference(measure, matched).spelled(measure.form) for measure in COMPARED)
            rows.append([group[0].arm.name, *cells])
            fewest = min(fewest, len(matched))
    title = f'less "{first[0].arm.name}", paired by seed, ± {shown_as(fewest)}'
    return Table(title, ["", *(measure.title for measure in COMPARED)], rows)
