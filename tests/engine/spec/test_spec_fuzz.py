"""Whatever a spec holds, `parse` and `build` answer with an objective or with a SpecError of
printable lines."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nitp_ops.engine.spec.grammar import parse_expression
from nitp_ops.objectives import NTP, ModelInfo, MTPShared, Spec, SpecError, available, build, parse

INFO = ModelInfo(hidden_size=4, vocab_size=8, num_layers=2)
DEEP: list[Any] = []
for _ in range(3000):
    DEEP = [DEEP]
RECURSIVE: dict[Any, Any] = {"weight": 1}
RECURSIVE["weight"] = RECURSIVE["offsets"] = [RECURSIVE]


def problems(spec: Any) -> list[str]:
    """What `build` finds, [] where it finds nothing; nothing but a SpecError may come out."""
    try:
        spec_of = parse(spec)
        json.loads(json.dumps(spec_of.to_dict()))
        assert parse(spec_of.to_dict()) == spec_of
        build(spec, model=INFO)
    except SpecError as error:
        assert error.problems
        for line in error.problems:
            assert line.isprintable() and len(line) < 2000
        return list(error.problems)
    return []


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("[" * 400 + "]" * 400 + "*ntp", 'expression: "[" at column 21, expected at most 20 lists '
                                         'inside one another'),
        ("]" * 400 + "+" + "[" * 400 + "]" * 400 + "*ntp", "expected at most 20 lists inside one "
                                                           "another"),
        ("ntp(z_loss=" + "(" * 3000, "expected at most 20 lists inside one another"),
        ("9" * 3900 + "*ntp", "expression: a number of 3900 digits at column 1, expected at most "
                              "100"),
        ("ntp(z_loss=-" + "9" * 200 + ")", "a number of 201 digits"),
        ("1e999*ntp", "weight is inf, expected a number"),
        ({"ntp": {"weight": 10**400}}, "ntp: weight is an integer of 1329 bits, expected a number"),
        ({"ntp": {"weight": -(10**5000)}}, "ntp: weight is an integer of 16610 bits, expected a "
                                           "number"),
        ({"ntp": {"weight": {"to": 10**400}}}, "ntp: schedule: to is an integer of 1329 bits, "
                                               "expected a number"),
        ({"ntp": {"weight": {"to": 1, "begin": 2**63}}}, "begin is 9223372036854775808, expected "
                                                         "an integer of 64"),
        ({"ntp": {"weight": {3: 1}}}, "ntp: schedule: 3 is no option, expected to, begin"),
        ({"ntp": {"weight": [[2**63, 1.0]]}}, "ntp: schedule: points holds [9223372036854775808, "
                                              "1.0]"),
        ({"ntp": {"weight": DEEP}}, "ntp: schedule: points holds [[[[[...]]]]]"),
        ({"ntp": {"z_loss": 10**400}}, "ntp: z_loss is an integer of 1329 bits, expected a number"),
        ({"ntp": {"z_loss": float("nan")}}, "ntp: z_loss is nan, expected a number"),
        ({"mtp_shared": {"offsets": [2, 10**30]}}, "mtp_shared: offsets is [2, "
                                                   "1000000000000000000000000000000], exp"),
        ({"mtp_shared": {"offsets": DEEP}}, "mtp_shared: offsets is [[[[[...]]]]], expected a "
                                            "list of integers"),
        ({"ntp": {"z_loss": torch.ones(3)}}, "ntp: z_loss is tensor([1., 1., 1.]), expected a "
                                             "number"),
        ({"nitp": {"distance": torch.ones(3)}}, "nitp: distance is tensor([1., 1., 1.]), expected "
                                                "one of"),
        ({"ntp": {3: 1}}, "ntp: 3 is no option, expected one of weight"),
        ({"ntp": {b"z_loss": 1}}, "ntp: b'z_loss' is no option"),
        ({"ntp": {None: 1, ("a", "b"): 2}}, "ntp: None is no option"),
        ({b"ntp": {}}, "b'ntp' is no label, expected a string"),
        ({True: {"type": "ntp"}}, "True is no label, expected a string"),
        ({"a": {"type": None}}, "a: type is None, expected the name of an objective"),
        ({"ntp": DEEP}, "ntp: the options are [[[[[...]]]]], expected a mapping"),
        ({"ntp": RECURSIVE}, "ntp: "),
        ([DEEP], "[[[[[...]]]]] is no registered objective"),
        ({"training": {"type": "ntp"}}, '"training" is no label'),
        ("_parameters: ntp", '"_parameters" is no label'),
        ("call_super_init: ntp", '"call_super_init" is no label'),
        ({"a\nb": {"type": "ntp"}}, r'"a\nb" is no label'),
        ({"\ud800": {}}, r'"\ud800" is no objective'),
        ({"ntp": {"\x00": 1}}, r'ntp: "\x00" is no option'),
        ({"nitp": {"distance": "\ud800\u2028"}}, r'nitp: distance is "\ud800\u2028", expected one '
                                                 r'of'),
        ("ntp & \ud800", "expression: '&' at column 5"),
        ("ntp \ud800", r"expression: '\ud800' at column 5"),
        ({"": {"type": "ntp"}}, "is no label"),
    ],
    ids=lambda value: ascii(value)[:30] if isinstance(value, str) else None,
)  # fmt: skip
def test_what_no_spec_should_hold_is_named(spec: Any, problem: str):
    found = problems(spec)
    assert any(problem in line for line in found), found


ATTRIBUTES = sorted({*dir(nn.ModuleDict()), *dir(nn.Module()), "loss"})


@pytest.mark.parametrize("name", [name for name in available() if name != "external"])
def test_a_label_that_is_an_attribute_of_a_module_is_refused(name: str):
    for label in ATTRIBUTES:
        assert problems({label: {"type": name}})[0].startswith(f'"{label}" is no label')
    for label in (
        "terms",
        "spec",
        "info",
        "requires",
        "draft",
        "explain",
        "count",
        "counts",
        "metrics",
    ):
        assert not problems(
            {label: {"type": name}, "ntp": {}} if name != "ntp" else {label: {"type": name}}
        )


HUGE = st.integers(63, 20000).map(lambda bits: 2**bits) | st.integers(64, 20000).map(
    lambda bits: -(2**bits)
)
ODD = {
    "deep": DEEP,
    "recursive": RECURSIVE,
    "tensor": torch.ones(2),
    "class": object,
    "set": {1, 2},
    "term": NTP(),
}
WORDS = st.sampled_from(
    ["", "\ud800", "a.b", "a/b", "\n", "\x00\x1b[31m", "training", "_parameters", "loss", "main"]
)
NAMES = st.sampled_from([*available(), "late"])
OPTIONS = st.sampled_from(
    [
        "weight",
        "type",
        "label",
        "denominator",
        "offsets",
        "depth",
        "target_layer",
        "distance",
        "window",
        "z_loss",
        "to",
    ]
)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 5), HUGE, st.floats(), st.binary(max_size=3), st.complex_numbers(),
    WORDS, NAMES, st.text(max_size=5), st.sampled_from(list(ODD)).map(lambda name: ODD[name]),
)  # fmt: skip
KEYS = st.one_of(
    OPTIONS, NAMES, WORDS, st.integers(0, 3), st.binary(max_size=2), st.none(), st.text(max_size=3)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
MAPPINGS = st.dictionaries(
    NAMES | KEYS, st.dictionaries(OPTIONS | KEYS, VALUES, max_size=3) | VALUES, max_size=3
)
TERMS = st.lists(
    st.sampled_from([NTP(), NTP(label="b"), MTPShared(offsets=(2,))]) | VALUES, max_size=3
)
FRAGMENTS = st.sampled_from(
    [*available(), "weight", "offsets", "depth", "z_loss", "schedule", "to", "late:", "training:", *"+*=,()[]:", "2",
     "0.5", "-1", "1e999", "9" * 5000, "[" * 300, "(" * 300, "]" * 300, '"', "'", "\n", "\ud800", "\u00a0", "true"]
)  # fmt: skip
EXPRESSIONS = st.lists(FRAGMENTS, max_size=14).map("".join)


@settings(max_examples=250)
@given(MAPPINGS | TERMS | EXPRESSIONS)
def test_nothing_but_a_spec_error_comes_out(spec: Any):
    problems(spec)


class Copied(str):
    """Text that counts the characters that slices of it copy."""

    copied = 0

    def __getitem__(self, key: Any) -> str:
        part = str.__getitem__(self, key)
        Copied.copied += len(part)
        return part


def calls(text: str) -> int:
    """Functions, Python's and C's, that are called while a spec is read."""
    counted = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        parse(text)
    except SpecError:
        pass
    finally:
        sys.setprofile(None)
    return counted


@pytest.mark.parametrize(
    "unit", ["ntp+", "ntq+", "a{}:ntp+", "nitp(shift=1)+", "ntp ", "[", "1", "  "]
)
def test_the_work_is_in_proportion_to_the_length_of_the_text(unit: str):
    def text(units: int) -> str:
        return "".join(unit.format(i) for i in range(units)) + "ntp"

    calls(text(2))  # what is imported and remembered on first use
    short, long = calls(text(20)), calls(text(80))
    assert long < 4.5 * short + 200
    Copied.copied = 0
    parse_expression(Copied(text(80)))
    assert Copied.copied <= 2 * len(text(80))


UNITS = ["ntp+", "ntq+", "a:ntp+", "1+", "ntp ", "[", "nitp(shift=1)+", "ntp(a=1)+"]
LISTS = {
    "options": "ntp({})",
    "offsets": "mtp_shared(offsets=[{}])",
    "points": "[{}]*ntp",
    "word": "ntp(z_loss={})",
}


@pytest.mark.parametrize("unit", UNITS)
def test_32_kilobytes_are_refused_at_once(unit: str):
    whole = (unit * 32768)[:32768]
    (line,) = problems(whole)
    assert (
        line
        == "expression: 32768 characters, expected at most 4000 (or a mapping, which may be longer)"
    )
    assert calls(whole) < 500


@pytest.mark.parametrize("unit", [*UNITS, *LISTS])
def test_the_longest_expression_is_read_or_refused_in_milliseconds(unit: str):
    """A call of Python's or of C's takes a tenth of a microsecond, or a few."""
    inside = {"options": "k{}=1,", "offsets": "{},", "points": "[{},1],", "word": "a+"}
    if unit in LISTS:
        items = "".join(inside[unit].format(i) for i in range(1, 2000))
        text = LISTS[unit].format(items[:3900].rpartition("," if "," in items else "+")[0])
    else:
        text = (unit * 4000)[:4000]
    assert len(problems(text)) <= 50
    assert calls(text) < 60_000


def test_more_than_a_hundred_terms_are_refused_in_every_spelling():
    labels = [f"a{i}" for i in range(101)]
    spellings = [
        "+".join(f"{x}:ntp" for x in labels),
        {x: {"type": "ntp"} for x in labels},
        [NTP(label=x) for x in labels],
    ]
    for spec in spellings:
        assert problems(spec) == ["the spec has 101 terms, expected at most 100"]
    with pytest.raises(SpecError, match="the spec has 101 terms"):
        Spec(tuple(NTP(label=x) for x in labels))
    assert not problems({x: {"type": "ntp"} for x in labels[:100]})


def test_more_options_than_any_objective_has_are_refused():
    assert problems({"ntp": {f"k{i}": 1 for i in range(101)}}) == [
        "ntp: 101 options, expected at most 100"
    ]


def test_the_message_of_thousands_of_problems_ends():
    error = SpecError(f"ntp: problem {i}" for i in range(8000))
    assert len(error.problems) == 8000
    assert len(str(error)) < 10_000 and str(error).endswith(" more")
