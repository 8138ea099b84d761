"""What the paper and a first trial say, as rows that the measured numbers confirm, contradict or leave open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .arms import BASELINE, DEFAULT
from .grid import Arms, Grid
from .outcome import COSINE, CROSS_ENTROPY, FLOOR, LOSS, RANK, Measure, difference, pairs
from .probing import LINEAR, NEAREST
from .spread import Difference, chance

GAIN = Measure("floor less loss", ".4f", lambda o: [o.numbers[f"{x}/floor"] - o.numbers[f"{x}/loss"] for x in o.labels])


@dataclass(frozen=True)
class Claim:
    """That `arm` differs from `against` in `measure`: higher (+1), lower (-1), or not at all (0)."""

    text: str
    source: str
    arm: str
    against: str | None
    """None: from zero."""
    measure: Measure
    direction: int


CLAIMS = (
    Claim("nitp leaves the cross-entropy as it is", "paper", DEFAULT, BASELINE, CROSS_ENTROPY, 0),
    Claim("nitp raises the effective rank", "paper", DEFAULT, BASELINE, RANK, 1),
    Claim("nitp lowers the mean pairwise cosine", "paper", DEFAULT, BASELINE, COSINE, -1),
    Claim("nitp learns more than the mean direction", "definition of skill", DEFAULT, None, GAIN, 1),
    Claim("at the same position the task is easy", "first trial", "same position", DEFAULT, LOSS, -1),
    Claim("without stop-gradient the target collapses", "first trial", "no stop-gradient", DEFAULT, FLOOR, -1),
    Claim(
        "without stop-gradient the cross-entropy rises", "first trial", "no stop-gradient", DEFAULT, CROSS_ENTROPY, 1
    ),
    Claim("without a projector hidden states align", "first trial", "no projector", DEFAULT, COSINE, 1),
)


@dataclass(frozen=True)
class Judged:
    """A claim beside its measurement."""

    claim: Claim
    found: Difference

    @property
    def verdict(self) -> str:
        """What a difference of this size beside this spread says."""
        if math.isnan(self.found.two_errors):
            return "open: one seed has no spread"
        if self.claim.direction == 0:
            return "differs at this scale" if self.found.outside else "no difference outside the spread of seeds"
        if not self.found.outside:
            return "open at this scale, inside the spread of seeds"
        return "reproduces" if self.found.mean * self.claim.direction > 0 else "the opposite at this scale"


def judge(arms: Arms) -> list[Judged]:
    """Every claim whose arms were run; a measure that one of them lacks (NaN) leaves it out."""
    by_name = {group[0].arm.name: group for group in arms}
    judged = []
    for claim in CLAIMS:
        own, base = by_name.get(claim.arm, []), by_name.get(claim.against or claim.arm, [])
        matched = pairs(base, own)
        other = [claim.measure.values(b)[0] for _, b in matched]
        one = [claim.measure.values(a)[0] if claim.against else 0.0 for a, _ in matched]
        found = Difference.between(one, other)
        if matched and math.isfinite(found.mean):
            judged.append(Judged(claim, found))
    return judged


def claims_grid(judged: Sequence[Judged], tokens_per_run: int) -> Grid:
    """The claims, their differences, and what would be needed where a difference stayed inside the spread."""
    rows = []
    for one in judged:
        claim, found = one.claim, one.found
        needed = found.pairs_needed
        open_still = not found.outside and math.isfinite(needed)
        runs = needed * (2 if claim.against else 1)
        rows.append(
            [
                claim.text,
                claim.source,
                f"{claim.measure.title}, {claim.arm} - {claim.against or '0'}",
                found.spelled(claim.measure.form),
                one.verdict,
                f"{needed:,.0f}" if open_still else "-",
                f"{runs * tokens_per_run:,.0f}" if open_still else "-",
            ]
        )
    header = ["", "said by", "measured", "difference ± two standard errors", "verdict", "seeds needed", "tokens needed"]
    return Grid("what reproduces", header, rows)


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


def differences(arms: Arms) -> tuple[Grid, str]:
    """Each arm less the first, and a sentence on how many of the differences chance alone would call one."""
    first, *others = arms
    name = first[0].arm.name
    title = f'less "{name}", paired by seed, ± two standard errors; * outside the spread of seeds'
    rows, all_found = [], []
    for group in others:
        if matched := pairs(first, group):
            found = [difference(measure, matched) for measure in COMPARED]
            cells = (f"{d.spelled(m.form)}{' *' * d.outside}" for m, d in zip(COMPARED, found, strict=True))
            rows.append([group[0].arm.name, *cells])
            all_found += found
    spread = [d for d in all_found if not math.isnan(d.two_errors)]
    said = (
        f"{sum(d.outside for d in spread)} of the {len(spread)} differences with a spread lie outside it. Were no arm "
        f'different from "{name}" in anything, chance alone would put about {sum(chance(d.pairs) for d in spread):.0f} '
        "there (Student's t; the differences are not independent, the arms share their seeds and the first arm)."
    )
    return Grid(title, ["", *(measure.title for measure in COMPARED)], rows), said
