"""What "ntp + nitp" adds to the time of a whole training step, beside the formula's prediction."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from benchmarks.measure.timing import interleave, ratios
from benchmarks.report.tables import Table
from experiments.train.data import Corpus
from experiments.train.model import ModelConfig
from experiments.train.options import Options
from experiments.train.run import Run
from nitp_ops.objectives import parse

DIMS = (256, 512, 1024)
BACKENDS = {"native": "ours", "reference": "eager"}
EXPRESSIONS = ("ntp", "ntp + nitp")


@dataclass(frozen=True)
class Overhead:
    """Step times at one width and backend, in seconds; the lists are rounds, interleaved in one
    process."""

    dim: int
    backend: str
    layers: int
    vocab: int
    tokens: int
    plain: list[float]
    added: list[float]

    @property
    def quartiles(self) -> dict[str, float]:
        """Of the rounds' own ratios "ntp + nitp" / "ntp", less 1."""
        return {name: ratio - 1 for name, ratio in ratios(self.added, self.plain).items()}

    @property
    def measured(self) -> float:
        """The median of the rounds' ratios, less 1."""
        return self.quartiles["median"]

    @property
    def predicted(self) -> float:
        """``1 / (L + V / (12 d))``: the projector's 12 d^2 parameters over the model's."""
        return 1 / (self.layers + self.vocab / (12 * self.dim))


def measure(
    dim: int,
    options: Options,
    corpus: Corpus,
    rounds: int,
    backends: list[str],
    show: Callable[[str], None],
) -> list[Overhead]:
    """Steps of both objectives on each backend in turns, in one process; the first round is not
    counted."""
    options = replace(options, dim=dim, steps=rounds + 1)
    runs = {
        (backend, expression): Run(
            expression, parse(expression), options, corpus, options.out, backend
        )
        for backend in backends
        for expression in EXPRESSIONS
    }
    steps = {key: run.step for key, run in runs.items()}
    seconds = interleave(steps, lambda: None, rounds=rounds + 1, seconds=math.inf)
    shapes: ModelConfig = options.model
    del runs, steps
    gc.collect()
    found = []
    for backend in backends:
        plain, added = (seconds[backend, expression][1:] for expression in EXPRESSIONS)
        result = Overhead(
            dim, backend, shapes.layers, shapes.vocab_size, options.tokens_per_step, plain, added
        )
        show(
            f"d = {dim}, {BACKENDS[backend]}: {result.measured:+.1%}, predicted "
            f"{result.predicted:+.1%}"
        )
        found.append(result)
    return found


def overhead_table(results: list[Overhead]) -> Table:
    """A row a width and backend."""
    rows: list[list[str]] = []
    for result in results:
        quartiles = result.quartiles
        rows.append(
            [
                f"d = {result.dim}, {BACKENDS[result.backend]}",
                f"{statistics.median(result.plain) * 1e3:,.1f}",
                f"{statistics.median(result.added) * 1e3:,.1f}",
                f"{quartiles['median']:+.1%}",
                f"{quartiles['q25']:+.1%} to {quartiles['q75']:+.1%}",
                f"{result.predicted:+.1%}",
                f"{result.measured / result.predicted:.2f}",
            ]
        )
    header = [
        "",
        '"ntp", ms',
        '"ntp + nitp", ms',
        "added",
        "middle half of the rounds",
        "formula 1 / (L + V / (12 d))",
        "added / formula",
    ]
    return Table("a whole training step: median times, median of the rounds' ratios", header, rows)


def record(result: Overhead) -> dict[str, Any]:
    """As a line of records."""
    return {"experiment": "overhead", **asdict(result)}


def from_record(line: dict[str, Any]) -> Overhead:
    """From a line of records."""
    return Overhead(**{field.name: line[field.name] for field in fields(Overhead)})
