"""Every refusal has one form: `name: argument is|has what was got, expected what`, and of names the
nearest valid one.

The first test reads the sources, so that no error is forgotten; the others look at what users
see."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nitp_ops.objectives import (
    NTP,
    Counts,
    HeadTerm,
    Metrics,
    ModelInfo,
    Need,
    Piecewise,
    Ramp,
    SequenceShard,
    SpecError,
    Streams,
    Window,
    build,
    parse,
    register,
    schedule,
)
from tests.ops.test_bad_input import WRONG
from tests.support.objectives_cases import INFO, make_batch

ROOT = Path(__file__).resolve().parents[2]
#: What an argument did. Errors of other types are about the world (a rank that stopped) or, as
#: Python's own, about attributes.
VERB = r"(is|are|were|has|have|holds|lacks?|got|requires|can|returned|disagrees|at column)"
REFUSALS = ("TypeError", "ValueError", "IndexError", "NotImplementedError", "SpecError")
FORM = re.compile(rf"\S.* (?:{VERB}\b.*[,;(] ?expected \S|is (?:not|only) supported\b)")
#: Expectations, or all of a message, that a variable holds: the other tests see them.
COMPUTED = (": {}", ", {}", ", {}{}")
NAMED = re.compile(rf"^[\w.]+: {FORM.pattern}")


def template(node: ast.expr) -> str:
    """The text of a message, `{}` for what is only known when it is raised."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(template, node.values))
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return "{}"


def raised() -> Iterator[tuple[str, str]]:
    """(place, template) of every refusal of the ops and the objectives."""
    for path in sorted([*(ROOT / "nitp_ops").rglob("*.py"), *(ROOT / "objectives").rglob("*.py")]):
        if path.relative_to(ROOT).parts[1] in ("attaching", "trainers"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            error = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(error, ast.Call) and error.args and ast.unparse(error.func) in REFUSALS:
                yield f"{path.name}:{error.lineno}", template(error.args[0])


def test_every_refusal_that_stands_in_the_sources_has_the_form():
    found, wrong = list(raised()), []
    for at, text in found:
        # what was got, or what was expected, may be all in a variable
        if text == "{}" or text.endswith(COMPUTED):
            continue
        if not FORM.search(text.replace(": {}, expected", ": it is it, expected")):
            wrong.append((at, text))
    assert len(found) > 150 and not wrong


@pytest.mark.parametrize(
    ("kind", "message", "wrong"), WRONG, ids=[message for _, message, _ in WRONG]
)
def test_what_an_op_refuses_has_the_form(kind: Any, message: str, wrong: Callable[[], object]):
    with pytest.raises(kind) as caught:
        wrong()
    assert NAMED.search(str(caught.value))


@dataclass(frozen=True, kw_only=True)
class Positional:
    pass


ANY: Any = 3
BATCH = make_batch()
IDS, HIDDEN = BATCH.ids, BATCH.hidden.detach()
COUNTS = Counts({"ntp": torch.tensor(1)})
REFUSED: tuple[Callable[[], object], ...] = (
    lambda: build("ntp", model=ANY),
    lambda: parse(ANY),
    lambda: build("ntp", model=INFO)(ANY),
    lambda: build("ntp + nitp", model=INFO)(BATCH.streams(last_hidden=None, head=None)),
    lambda: build("ntp", model=INFO)(BATCH.streams(last_hidden=HIDDEN[..., :3])),
    lambda: build("ntp", model=INFO)(BATCH.streams(token_ids=IDS + 99)),
    lambda: build("ntp", model=INFO)(BATCH.streams(head=nn.Linear(3, 3))),
    lambda: build("ntp", model=INFO)(BATCH.streams(head=nn.Sequential(nn.Linear(3, 3)))),
    lambda: build("ntp", model=INFO)(BATCH.streams(), counts=COUNTS + COUNTS, window=Window()),
    lambda: build("ntp + nitp", model=INFO)(BATCH.streams(), counts=COUNTS),
    lambda: build("ntp", model=INFO)(BATCH.streams(), step=-1),
    lambda: build("ntp", model=INFO)(BATCH.streams(), window=ANY),
    lambda: build([NTP(weight=Ramp(to=1.0))], model=INFO)(BATCH.streams()),
    lambda: build("ntp", model=INFO).draft(ANY, IDS[:1], 1),
    lambda: build("ntp + mtp_shared", model=INFO).draft(ANY, IDS[:1], 1, label="mtp_share"),
    lambda: build("ntp + mtp_shared", model=INFO).draft(ANY, IDS[:1], -1),
    lambda: Streams(),
    lambda: Streams(token_ids=IDS[0]),
    lambda: Streams(token_ids=IDS.double()),
    lambda: Streams(labels=IDS, shift_labels=IDS),
    lambda: Streams(token_ids=IDS, labels=IDS[:, :2]),
    lambda: Streams(token_ids=IDS, label_layout=ANY),
    lambda: Streams(token_ids=IDS, ignore_index=2**70),
    lambda: Streams(token_ids=IDS, hidden_states=ANY),
    lambda: Streams(token_ids=IDS, shard=ANY),
    lambda: Streams(token_ids=IDS, last_hidden=HIDDEN[:, :2]),
    lambda: Streams(token_ids=IDS, target_mask=IDS),
    lambda: Streams(token_ids=IDS, token_weight=IDS),
    lambda: Streams(token_ids=IDS, attention_mask=IDS.double()),
    lambda: Streams(token_ids=IDS, external={"x": ANY}),
    lambda: Streams(token_ids=IDS, external={"x": (torch.tensor(1.0), ANY * 0.5)}),
    lambda: Streams(token_ids=IDS, cu_seqlens=torch.tensor([0, 99])),
    lambda: Streams(token_ids=IDS, cu_seqlens=IDS),
    lambda: Streams(token_ids=IDS, document_ids=IDS * 0, attention_mask=IDS * 0),
    lambda: Window(counts=ANY),
    lambda: Window(gradient_reduction=ANY),
    lambda: COUNTS + Counts({}),
    lambda: Metrics({}) + Metrics({"ntp": {}}),
    lambda: Need(ANY),
    lambda: Need("head", layer=1),
    lambda: Need("external"),
    lambda: ModelInfo(hidden_size=0, vocab_size=1, num_layers=1),
    lambda: ModelInfo(hidden_size=1, vocab_size=1, num_layers=1, softcap=-1.0),
    lambda: ModelInfo(hidden_size=1, vocab_size=1, num_layers=1, logit_scale=ANY and "x"),  # type: ignore[arg-type]
    lambda: SequenceShard(length=0),
    lambda: SequenceShard(length=ANY * 0.5),
    lambda: SequenceShard(length=4, layout=ANY),
    lambda: schedule(),
    lambda: Ramp(to=-1.0),
    lambda: Piecewise(((2, 1.0), (1, 1.0))),
    lambda: Piecewise(((0, -1.0),)),
    lambda: register("positional")(Positional),  # type: ignore[type-var]
    lambda: register("ntp")(dataclass(frozen=True, kw_only=True)(type("Another", (HeadTerm,), {}))),
)


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_an_objective_refuses_has_the_form(wrong: Callable[[], object]):
    with pytest.raises((TypeError, ValueError, IndexError)) as caught:
        wrong()
    assert (FORM if isinstance(caught.value, SpecError) else NAMED).search(str(caught.value))
    assert "\n" not in str(caught.value)


SPECS = (
    ("nitpp", '"nitp"'), ("ntp + nitp(sorce=last_hidden)", '"source"'),
    ("nitp(distance=cosin)", '"cosine"'), ("mtp_parallel(heads=blok)", '"block"'),
    ("nitp(projector=swigly)", '"swiglu"'), ("nitp(target_layer=99)", ""), ("ntp(z_loss=-1)", ""),
    ("ntp(label_smoothing=2)", ""), ("mtp_shared(offsets=[0])", ""),
    ("mtp_shared(weights=[1])", ""), ("nitp(target_layer=1.5, "
                                      "eps=0)", ""), ("ntp + ntp", ""), ("ntp(weight=-1)", ""),
    ("ntp(weight=x)", ""),
    ("ntp(", ""), ("ntp +", ""), ("", ""), ("ntp*", ""), ("top(window=0)", ""), ("a: a: ntp", ""),
    ("nitp(intermediate_size=99999)", ""), ("nitp(projector=none, "
                                            "intermediate_size=4)", ""), ("ntp ntp", ""),
)  # fmt: skip


@pytest.mark.parametrize(("spec", "nearest"), SPECS)
def test_each_problem_of_a_spec_has_the_form_and_names_the_nearest(spec: str, nearest: str):
    with pytest.raises(SpecError) as caught:
        build(spec, model=INFO)
    assert all(FORM.search(problem) for problem in caught.value.problems)
    assert not nearest or str(caught.value).endswith(f"Did you mean {nearest}?")
