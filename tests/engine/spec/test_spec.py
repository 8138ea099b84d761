"""Three spellings of one spec, and errors that name everything that is wrong."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitp_ops.objectives import (
    NITP,
    NTP,
    ModelInfo,
    Piecewise,
    Ramp,
    Spec,
    SpecError,
    build,
    parse,
    schedule,
)

EXPRESSION = "ntp(z_loss=1e-4) + 0.8*nitp(target_layer=0.2) + late: schedule(to=0.1, warmup=1000)*nitp(target_layer=8)"
MAPPING = {
    "ntp": {"z_loss": 1e-4},
    "nitp": {"weight": 0.8, "target_layer": 0.2},
    "late": {"type": "nitp", "weight": {"to": 0.1, "warmup": 1000}, "target_layer": 8},
}
TERMS = [
    NTP(z_loss=1e-4),
    NITP(weight=0.8, target_layer=0.2),
    NITP(label="late", weight=schedule(to=0.1, warmup=1000), target_layer=8),
]


def problems(spec: object) -> tuple[str, ...]:
    with pytest.raises(SpecError) as caught:
        parse(spec)  # type: ignore[arg-type]
    return caught.value.problems


def test_the_three_spellings_give_one_spec():
    spec = parse(EXPRESSION)
    assert spec == parse(MAPPING) == parse(TERMS) == parse(spec)
    assert hash(spec) == hash(parse(MAPPING))
    assert spec != parse("ntp + nitp")


def test_a_spec_survives_json():
    spec = parse(EXPRESSION + " + steps: [[0, 0.3], [2000, 0.1]]*nitp")
    assert parse(json.loads(json.dumps(spec.to_dict()))) == spec


def test_yaml_may_leave_the_options_empty():
    assert parse({"ntp": None}) == parse("ntp")


def test_one_dataclass_is_a_spec():
    assert parse(NTP()) == parse("ntp")


def test_a_spec_keeps_declaration_order_and_labels():
    assert [term.label for term in parse(EXPRESSION).terms] == ["ntp", "nitp", "late"]


def test_specs_and_objectives_are_frozen():
    with pytest.raises(AttributeError):
        parse("ntp").terms[0].weight = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "weight"),
    [
        ("ntp", 1.0),
        ("2*ntp", 2.0),
        (" .5 * ntp ", 0.5),
        ("1e-2*ntp()", 0.01),
        ("schedule(to=2)*ntp", Ramp(to=2.0)),
        (
            "schedule(to=.5, begin=10, warmup=5, shape=cosine)*ntp",
            Ramp(to=0.5, begin=10, warmup=5, shape="cosine"),
        ),
        ("[[0, 1], [5, 0.5]]*ntp", Piecewise(((0, 1.0), (5, 0.5)))),
        ("((0, 1), (5, 0.5))*ntp", Piecewise(((0, 1.0), (5, 0.5)))),
    ],
)
def test_weights_are_numbers_or_schedules(text: str, weight: object):
    assert parse(text).terms[0].weight == weight


def test_options_are_words_strings_numbers_and_truth_values():
    (term,) = parse(
        "nitp(distance=mse, mask='document+label', target_layer=3, stop_gradient=false, eps=1e-3)"
    ).terms
    assert term == NITP(
        label="nitp",
        distance="mse",
        mask="document+label",
        target_layer=3,
        stop_gradient=False,
        eps=1e-3,
    )
    assert parse("nitp(mask=document+label)") == parse('nitp(mask="document+label")')
    assert parse("nitp(projector=none, target_norm=none)") == parse(
        NITP(projector="none", target_norm="none")
    )
    assert parse("nitp(intermediate_size=null,)") == parse("nitp")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the end"),
        ("ntp +", '"the end" at column 6, expected the name of an objective'),
        ("+ ntp", 'expression: "+" at column 1, expected the name'),
        ("ntp nitp", '"nitp" at column 5, expected "+" or the end'),
        ("ntp * 2", '"*" at column 5, expected "+" or the end'),
        ("0.8 nitp", '"nitp" at column 5, expected "*"'),
        ("nitp(shift=)", '")" at column 12, expected a value'),
        ("nitp(shift)", '")" at column 11, expected "="'),
        ("nitp(shift=1", "at column 13"),
        ("nitp(shift=1, shift=2)", "shift at column 15 is given twice"),
        ("ntp & nitp", "'&' at column 5 is not part of the grammar"),
        (
            "nitp(weight=2)",
            "weight at column 5 is an option, expected it in label: weight*name(...)",
        ),
        ("ntp(z_loss=__import__('os'))", '"(" at column 22'),
    ],
)
def test_an_expression_that_cannot_be_read_is_refused_with_its_column(text: str, problem: str):
    assert any(problem in line for line in problems(text)), problems(text)


def test_unknown_names_and_options_are_answered_with_the_nearest_known():
    (name,) = problems("ntq")
    assert name.startswith('"ntq" is no objective, expected one of') and name.endswith(
        'Did you mean "ntp"?'
    )
    (option,) = problems("nitp(target_leyer=2)")
    assert '"target_leyer" is no option' in option and option.endswith(
        'Did you mean "target_layer"?'
    )
    (value,) = problems("nitp(distance=cosin)")
    assert value == (
        'nitp: distance is "cosin", expected one of "cosine", "mse", "smooth_l1", "kl". Did you '
        'mean "cosine"?'
    )
    (key,) = problems({"ntp": {"weight": {"to": 1, "warmap": 5}}})
    assert "warmap" in key and 'Did you mean "warmup"?' in key


def test_all_problems_come_in_one_error():
    found = problems(
        "ntp(z_loss=-1, smoothing=1) + 0.5*nitb + late: nitp(shift=-1, eps=0) + 3 nitp"
    )
    assert len(found) == 6
    for part in ("late: shift", "late: eps", "ntp: z_loss", 'ntp: "smoothing"', '"nitb"', "column"):
        assert sum(part in line for line in found) == 1, part
    with pytest.raises(SpecError, match="6 problems in the spec"):
        parse("ntp(z_loss=-1, smoothing=1) + 0.5*nitb + late: nitp(shift=-1, eps=0) + 3 nitp")


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({}, "the spec is empty"),
        ([], "the spec is empty"),
        ("nitp + 0.1*nitp(target_layer=8)", "nitp: the label is given twice"),
        ("a: ntp + a: nitp", "a: the label is given twice"),
        ("loss: ntp", '"loss" is no label'),
        ("keys: ntp", '"keys" is no label'),
        ({"a.b": {"type": "ntp"}}, '"a.b" is no label'),
        ({"ntp": 2}, "ntp: the options are 2, expected a mapping"),
        ({"ntp": {"label": "x"}}, "label is 'x', expected it as the key"),
        (["ntp"], "'ntp' is no registered objective"),
        ("-1*ntp", "weight is -1, expected a number >= 0 or a schedule"),
        ({"ntp": {"weight": True}}, "weight is True, expected a number"),
        ({"ntp": {"weight": float("nan")}}, "weight is nan, expected a number"),
        ({"ntp": {"weight": "much"}}, "weight is 'much', expected a number"),
        ("nitp(denominator=main)", 'denominator is "main", expected an ntp term'),
        ("nitp(target_layer=1.0)", "target_layer is 1.0, expected a fraction strictly inside"),
        ("nitp(target_layer=0.0)", "target_layer is 0.0, expected a fraction"),
        ("nitp(target_layer=true)", "target_layer is True, expected an integer or a number"),
        ("nitp(target_layer=-1)", "target_layer is -1, expected a number >= 0"),
        ("nitp(shift=1.5)", "shift is 1.5, expected an integer"),
        ("nitp(stop_gradient=1)", "stop_gradient is 1, expected true or false"),
        ("nitp(projector=linear, intermediate_size=4)", "intermediate_size is 4, expected none"),
        ("ntp(label_smoothing=1.5)", "label_smoothing is 1.5, expected a number in [0, 1]"),
    ],
    ids=str,
)
def test_a_wrong_spec_is_refused_with_its_reason(spec: object, problem: str):
    found = problems(spec)
    assert len(found) == 1 and problem in found[0]


def test_a_dataclass_with_a_wrong_option_is_refused_at_once():
    with pytest.raises(SpecError, match=r"nitp: shift is -1, expected an integer in"):
        NITP(shift=-1)


def test_something_that_is_no_spec_is_a_type_error():
    with pytest.raises(
        TypeError, match="spec is a int, expected an expression, a mapping or a list"
    ):
        parse(3)  # type: ignore[arg-type]


NITPS = st.builds(
    NITP,
    weight=st.floats(0, 10)
    | st.builds(Ramp, to=st.floats(0, 5), begin=st.integers(0, 9), warmup=st.integers(0, 9)),
    target_layer=st.integers(0, 40) | st.floats(0, 1, exclude_min=True, exclude_max=True),
    shift=st.integers(0, 4),
    distance=st.sampled_from(["cosine", "mse", "smooth_l1", "kl"]),
    projector=st.sampled_from(["swiglu", "linear", "none"]),
    stop_gradient=st.booleans(),
    eps=st.floats(1e-9, 1.0),
)


def expression(term: NITP) -> str:
    """The term as an expression, every option spelled out."""
    options = parse(term).to_dict()["nitp"]
    weight = options.pop("weight")
    if isinstance(weight, dict):
        weight = f"schedule({', '.join(f'{key}={value}' for key, value in weight.items())})"
    options = {
        key: f'"{value}"' if isinstance(value, str) else value for key, value in options.items()
    }
    return f"{weight}*nitp({', '.join(f'{key}={value}' for key, value in options.items())})"


@settings(deadline=None, max_examples=60)
@given(NITPS)
def test_every_spelling_of_every_option_is_the_same_spec(term: NITP):
    spec = parse(term)
    assert parse(expression(term)) == spec == parse(json.loads(json.dumps(spec.to_dict())))


@settings(deadline=None, max_examples=150)
@given(st.text("ntip+*:()[]=, .0123456789_schedule'\"-", max_size=40))
def test_any_text_is_a_spec_or_a_spec_error(text: str):
    try:
        assert isinstance(parse(text), Spec)
    except SpecError as error:
        assert error.problems and all("\n" not in line for line in error.problems)


def test_an_option_of_the_wrong_type_hides_none_of_the_others():
    assert [
        line.split(", expected")[0]
        for line in problems("ntp + nitp(distance=foo, eps=0, shift=-1)")
    ] == [
        'nitp: distance is "foo"',
        "nitp: shift is -1",
        "nitp: eps is 0.0",
    ]


def test_a_target_past_every_sequence_is_refused_with_all_other_problems():
    info = ModelInfo(hidden_size=4, vocab_size=8, num_layers=2, sequence_length=4)
    with pytest.raises(SpecError) as caught:
        build(
            "ntp + mtp_shared(offsets=[2, 4]) + mtp_sequential(depth=3) + nitp(shift=9, "
            "target_layer=7)",
            model=info,
        )
    assert list(caught.value.problems) == [
        "mtp_shared: the target x_(t+4) lies past every sequence, expected at most t+3 (T = 4)",
        "mtp_sequential: the target x_(t+4) lies past every sequence, expected at most t+3 (T = 4)",
        "nitp: target_layer is 7, expected an integer in [0, 1] (the model has 2 blocks)",
        "nitp: the target x_(t+9) lies past every sequence, expected at most t+3 (T = 4)",
    ]
    build("ntp + mtp_shared(offsets=[2, 3]) + mtp_sequential(depth=2) + nitp(shift=3)", model=info)
