"""`Need`: what an objective reads, as values; each stream once, with a gradient where one term
wants it."""

from __future__ import annotations

from typing import Any

import pytest

from nitp_ops.engine.streams.needs import checked
from nitp_ops.objectives import NITP, NTP, Need, build
from tests.support.objectives_cases import INFO


def state(k: int, *, grad: bool) -> Need:
    return Need("hidden_states", layer=k, grad=grad)


def test_a_need_is_written_as_the_stream_that_it_names():
    assert [
        str(x) for x in (Need("head"), state(4, grad=False), Need("external", name="router"))
    ] == [
        "head",
        "hidden_states[4]",
        "external[router]",
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"stream": 3}, TypeError, "Need: stream is 3, expected a field of Streams"),
        (
            {"stream": "hidden_states"},
            ValueError,
            "Need: layer is None, expected a number of blocks",
        ),
        (
            {"stream": "hidden_states", "layer": -1},
            ValueError,
            "Need: layer is -1, expected a number of blocks",
        ),
        (
            {"stream": "hidden_states", "layer": True},
            ValueError,
            "Need: layer is True, expected a number of blocks",
        ),
        ({"stream": "head", "layer": 2}, ValueError, 'Need: layer is 2, expected None with "head"'),
        ({"stream": "external"}, ValueError, "Need: name is None, expected a name"),
        (
            {"stream": "head", "name": "x"},
            ValueError,
            "Need: name is 'x', expected None with \"head\"",
        ),
    ],
    ids=str,
)
def test_what_is_no_need_is_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=f"^{message}$"):
        Need(**arguments)


def test_requires_names_exactly_the_streams_that_are_read():
    assert build("ntp", model=INFO).requires == {
        Need("token_ids"),
        Need("last_hidden"),
        Need("head"),
    }
    objective = build("nitp(source=last_residual, target_layer=3)", model=INFO)
    assert objective.requires == {Need("token_ids"), Need("last_residual"), state(3, grad=False)}
    assert isinstance(objective.requires, frozenset)


def test_a_state_that_several_terms_read_is_required_once_with_the_gradient_that_one_wants():
    frozen = build("ntp + nitp(target_layer=2)", model=INFO)
    assert state(2, grad=False) in frozen.requires and state(2, grad=True) not in frozen.requires
    for labels in (("a", "b"), ("b", "a")):
        terms = {"a": {"target_layer": 2}, "b": {"target_layer": 2, "stop_gradient": False}}
        both = build({label: {"type": "nitp", **terms[label]} for label in labels}, model=INFO)
        assert [need for need in both.requires if need.layer == 2] == [state(2, grad=True)]
    for order in ((False, True), (True, False)):
        assert checked("tap", [state(2, grad=grad) for grad in order]) == {state(2, grad=True)}
    (own,) = (need for need in NITP(target_layer=2).requires(INFO) if need.layer is not None)
    assert own == state(2, grad=False)


def test_a_string_among_the_needs_is_refused_in_the_name_of_its_term(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(NTP, "requires", lambda self, info: frozenset({"token_ids"}))
    with pytest.raises(TypeError, match=r"^mine: requires has 'token_ids', expected a Need$"):
        build("mine: ntp", model=INFO)
    with pytest.raises(TypeError, match=r"^tap: requires has 'last_hidden', expected a Need$"):
        checked("tap", ["last_hidden"])  # type: ignore[list-item]
