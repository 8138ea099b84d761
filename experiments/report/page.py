"""One self-contained page of a comparison: opens from the disk, loads nothing, runs nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from benchmarks.report import pages, storage
from benchmarks.report.environment import here, machine_line
from experiments.analysis.fused_head import HeadCost
from experiments.analysis.results import COST, QUALITY
from experiments.analysis.statistics import no_verdict
from experiments.console.command import command_line
from experiments.train.data import Corpus
from experiments.train.options import Options
from experiments.train.run import model_info
from nitp_ops.objectives import build

from . import hypotheses, table

DEFINITIONS = (
    (
        "cross-entropy",
        "nats a byte, next byte, mean over the held-out windows; never smoothed or weighted",
    ),
    (
        "latent-term loss",
        "mean over held-out pairs, in the term's own distance; 1 - cos for the default",
    ),
    (
        "constant-predictor loss",
        "1 - |mean of the unit targets|: of the best constant under the cosine distance",
    ),
    (
        "skill",
        "1 - loss / constant-predictor loss, - where that is below 1e-4 or the distance is not "
        "the cosine",
    ),
    ("|P(h)|, |z|", "mean length of the projected prediction and of its target"),
    (
        "effective rank",
        "exp(-sum p ln p), p = eigenvalues of the mean-centred covariance of the last hidden "
        "states",
    ),
    ("mean pairwise cosine", "mean of cos(h_i, h_j) over all pairs of last hidden states"),
    (
        "linear probe",
        "ridge regression of one-hot x[t+j] on the frozen last hidden state h_t; accuracy of its "
        "argmax",
    ),
    ("nearest neighbours", "vote of the 16 nearest training states (Euclidean) on x[t+j]"),
    ("probes, both", "fitted and tested on different windows of the text that training never saw"),
)


def write(
    path: Path,
    options: Options,
    corpus: Corpus,
    arms: table.Arms,
    costs: Sequence[HeadCost],
    curves: str,
) -> None:
    """Write the page; whatever came from a user or a model is escaped. `curves` is an SVG element.

    Raises:
        OSError: the disk refused; an older page is intact.
    """
    trained = f"{options.steps:,} steps of {options.tokens_per_step:,} tokens, seeds {', '.join(map(str, options.seeds))}"
    shapes = (
        f"width {options.dim}, {options.layers} blocks, {options.heads} heads, context "
        f"{options.context}, {options.dtype}, learning rate {options.lr:g}"
    )
    facts = [
        ("command", command_line()),
        ("machine", machine_line(here(options.device))),
        ("text", f"{corpus.description}; fingerprint {corpus.fingerprint}"),
        ("each run", f"{trained}; {shapes}"),
    ]
    tables = [table.measured(arms, (*QUALITY, *COST)), table.probes(arms)]
    if len(arms) > 1:
        tables.append(hypotheses.differences(arms))
    info = model_info(options.model)
    described = [group[0].arm for group in arms]
    if any(arm.tests for arm in described):
        tables.insert(0, table.plan(described))
    if costs:
        tables.append(table.head_table(costs))
    content = pages.render(
        "comparison.html",
        Path(__file__).parent,
        title=f"{len(arms)} objectives compared on {arms[0][0].numbers['rows']:,.0f} held-out "
        "bytes",
        facts=facts,
        notes=[hypotheses.NOT_MEASURED, *filter(None, [no_verdict(min(map(len, arms)))])],
        tables=tables,
        curves=Markup(curves),
        definitions=DEFINITIONS,
        arms=[
            {
                "name": group[0].arm.name,
                "expression": group[0].arm.expression,
                "json": json.dumps(group[0].arm.spec.to_dict(), indent=2),
                "explained": build(group[0].arm.spec, model=info).explain(),
                "sample": group[0].sample,
            }
            for group in arms
        ],
    )
    storage.write(path, content)
