"""`python -m nitp_ops.engine.reports.scaling > docs/scaling.md`: what objectives send and hold on
meshes of many ranks."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from nitp_ops.engine.streams.model_info import ModelInfo

from .cost_model import Cost, Mesh, estimate_cost

_TOKENS, _VOCABULARY = 8192, 152064


class _Setting(NamedTuple):
    name: str
    width: int
    layers: int
    vocabulary: int
    specs: tuple[str, ...]
    mesh: Mesh
    remark: str


def _settings() -> Iterator[_Setting]:
    yield _Setting(
        "MoE 9B-A1B",
        1280,
        24,
        _VOCABULARY,
        ("ntp", "ntp + 0.8*nitp(target_layer=5)", "ntp + 0.3*mtp_sequential"),
        Mesh(dp=64),
        "the paper's sizes",
    )
    yield _Setting(
        "MoE 45B-A5.5B",
        3072,
        24,
        _VOCABULARY,
        ("ntp", "ntp + 0.6*nitp(target_layer=5)", "ntp + 0.3*mtp_sequential"),
        Mesh(dp=512),
        "the paper's sizes",
    )
    yield _Setting(
        "dense 400B",
        16384,
        126,
        128256,
        ("ntp", "ntp + 0.8*nitp", "ntp + mtp_shared"),
        Mesh(tp=8, dp=1024, cp=4),
        "d = 16384, 126 blocks, about the largest dense models that have been published",
    )


_HEAD = f"""# Scaling

Written by `python -m nitp_ops.engine.reports.scaling > docs/scaling.md` from the calculator behind
`python -m nitp_ops explain SPEC --hidden D --vocab V --layers L --tokens N --mesh tp=8,dp=1024,cp=4`. Nothing on this
page was measured: no machine of this size was there. What was measured is that the same calculator gives, to the byte,
what four processes hand to their collectives, for every registered objective
(`tests/distributed/objectives/test_cost_model.py`).

Each rank holds {_TOKENS:,} tokens of one sequence a microbatch, in bfloat16. Head, embedding and each term's own
parameters are FSDP2 groups over data x context parallel ranks, cut again after their forward pass; head and embedding
are also cut by vocabulary over tensor parallel ranks, own parameters are whole on each of them. Only what the objective
reads is counted: the blocks, and the embedding where the model itself reads it, come on top and do not depend on the
objective. "sent" is what one rank sends in a ring of p ranks: (p - 1) / p of the bytes, twice for an all-reduce.
"""


#: First words of the rows of a table, in its order.
_ORDER = ("sent", "**sent", "held:", "**held")


def page() -> str:
    """docs/scaling.md."""
    return "\n".join([_HEAD, *("\n".join(_section(setting)) for setting in _settings())])


def _section(setting: _Setting) -> Iterator[str]:
    info = ModelInfo(
        hidden_size=setting.width,
        vocab_size=setting.vocabulary,
        num_layers=setting.layers,
        dtype=torch.bfloat16,
    )
    axes = ", ".join(f"{name} {ranks}" for name, ranks in vars(setting.mesh).items())
    yield f"## {setting.name} on {math.prod(vars(setting.mesh).values()):,} ranks\n"
    yield f"Mesh: {axes}. d = {setting.width}, V = {setting.vocabulary}, {setting.layers} blocks: {setting.remark}.\n"
    costs = {
        spec: estimate_cost(spec, info, setting.mesh, tokens=_TOKENS) for spec in setting.specs
    }
    yield "| a rank | " + " | ".join(f"`{spec}`" for spec in costs) + " |"
    yield "| --- |" + " ---: |" * len(costs)
    rows: dict[str, dict[str, int]] = {}
    for spec, cost in costs.items():
        for name, number in _numbers(cost):
            rows.setdefault(name, {})[spec] = number
    for name, found in sorted(rows.items(), key=lambda row: _ORDER.index(row[0].partition(" ")[0])):
        yield f"| {name} | " + " | ".join(_short(found.get(spec, 0)) for spec in costs) + " |"
    yield ""


def _numbers(cost: Cost) -> Iterator[tuple[str, int]]:
    of: dict[str, int] = {}
    for each in cost.traffic:
        purpose, _, module = each.purpose.partition(" of ")
        own = f"{purpose} of terms" if module and module not in ("head", "embed") else each.purpose
        name = f"sent a {each.every}: {own}"
        of[name] = of.get(name, 0) + each.sent
    yield from of.items()
    yield "**sent a step of one microbatch**", cost.sent
    yield from ((f"held: {what}", size) for what, size in cost.memory.items())
    yield "**held at the peak**", cost.peak


def _short(number: int) -> str:
    if number < 1024:
        return f"{number} B"
    power = min(4, int(math.log(number, 1024)))
    return f"{number / 1024**power:,.1f} {'KMGT'[power - 1]}iB"


if __name__ == "__main__":
    importlib.import_module("nitp_ops.objectives")  # it offers the built-in ones
    print(page(), end="")
