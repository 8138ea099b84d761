"""What the numbers say, in words: every sentence is made from them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from experiments.analysis.fused_head import HeadCost
from experiments.analysis.probing import LINEAR, MAJORITY, NEAREST, OFFSETS
from experiments.analysis.results import COSINE, CROSS_ENTROPY, RANK, Outcome, difference, pairs
from experiments.analysis.statistics import no_verdict, shown_as
from experiments.train.evaluate import paired_spread

from .table import WIDE, Arms, spelled

NOT_MEASURED = (
    "The paper's scores are means over five downstream benchmarks of a 3B-parameter mixture of experts, one seed each. "
    "No benchmark is measured here: they stand beside the arms to name what each one controls for, not to be compared."
)
COMPARED = (CROSS_ENTROPY, RANK, COSINE)


def about(arms: Arms) -> list[str]:
    """What each arm did, and each against the first; of many arms only the floor and the cross-entropy."""
    few = len(arms) <= WIDE
    said = []
    for group in arms:
        said += [_against_floor(group, label) for label in group[0].labels]
        said += [_probes(group)] if few else []
    first, *others = arms
    for other in others:
        paired = pairs(first, other)
        about_pair = _over_seeds(paired) if len(paired) > 1 else _one_seed(*paired[0]) if paired else []
        said += about_pair if few else about_pair[:1]
    return said


def _against_floor(group: Sequence[Outcome], label: str) -> str:
    def values(key: str) -> list[float]:
        return [outcome.numbers[f"{label}/{key}"] for outcome in group]

    losses, floors = values("loss"), values("floor")
    name, loss, floor = group[0].arm.name, spelled(losses, ".4f"), spelled(floors, ".4f")
    if any(map(math.isnan, floors)):
        return (
            f"{name}: {label} loss {loss} on held-out text; a constant predictor's floor is known for the cosine only."
        )
    if any(map(math.isnan, values("skill"))):
        return (
            f"{name}: {label}: no skill on held-out text, either no pair counts or the floor {floor} is below 1e-4 "
            f"(loss {loss})."
        )
    below = sum(a < b for a, b in zip(losses, floors, strict=True))
    side = {0: "not below", len(group): "below"}.get(below, f"below, in {below} of {len(group)} seeds,")
    return (
        f"{name}: {label} loss {loss} on held-out text is {side} the constant-predictor floor {floor}: "
        f"skill {spelled(values('skill'), '.2f')}."
    )


def _probes(group: Sequence[Outcome]) -> str:
    near, far = OFFSETS[0], OFFSETS[-1]

    def percent(key: str) -> str:
        one, other = ([100 * o.numbers[f"{key}/{offset}"] for o in group] for offset in (near, far))
        return f"{spelled(one, '.1f')} % and {spelled(other, '.1f')} %"

    return (
        f"{group[0].arm.name}: from its frozen last hidden state a linear probe names x[t+{near}] and x[t+{far}] in "
        f"{percent(LINEAR)} of the rows, nearest neighbours in {percent(NEAREST)}; always the most frequent token: "
        f"{percent(MAJORITY)}."
    )


def _one_seed(one: Outcome, two: Outcome) -> list[str]:
    against, a, b = f"{two.arm.name} against {one.arm.name}", one.numbers, two.numbers
    difference, spread = b["cross_entropy"] - a["cross_entropy"], paired_spread(one.batches, two.batches)
    slower = b["step_seconds"] / a["step_seconds"] - 1
    middle = [f"{1e3 * x['step_low']:.1f} to {1e3 * x['step_high']:.1f} ms" for x in (b, a)]
    return [
        f"{against}, cross-entropy: {difference:+.4f} nats a byte; two standard errors over {len(one.batches)} "
        f"held-out batches are {spread:.4f}: the choice of text alone. {no_verdict(1)}",
        f"{against}, last hidden states: effective rank {b['effective_rank']:.2f} against {a['effective_rank']:.2f} "
        f"(ratio {b['effective_rank'] / a['effective_rank']:.2f}; covariance eigenvalues, centred, "
        f"n = {b['rows']:,.0f}), mean pairwise cosine {b['mean_cosine']:.4f} against {a['mean_cosine']:.4f}. "
        "One seed each, no spread measured.",
        f"{against}, median step: {1e3 * b['step_seconds']:.1f} ms against {1e3 * a['step_seconds']:.1f} ms "
        f"({slower:+.0%}); the middle half of the steps took {middle[0]} against {middle[1]}.",
    ]


def _over_seeds(paired: Sequence[tuple[Outcome, Outcome]]) -> list[str]:
    against = f"{paired[0][1].arm.name} against {paired[0][0].arm.name} over {len(paired)} seeds"
    said = [
        f"{against}, {measure.title}: {difference(measure, paired).spelled(measure.form)} ({shown_as(len(paired))})."
        for measure in COMPARED
    ]
    return [*said, *filter(None, [no_verdict(len(paired))])]


def about_head(costs: Sequence[HeadCost]) -> str:
    """The two ratios of the output head."""
    eager, fused = costs
    memory, seconds = fused.peak_bytes / eager.peak_bytes, fused.seconds / eager.seconds
    return (
        f"At V = {eager.vocab:,} the fused head peaks at {memory:.2f} x the memory of eager and takes "
        f"{seconds:.2f} x its time (gradients included, each in a fresh process, fastest of its passes)."
    )
