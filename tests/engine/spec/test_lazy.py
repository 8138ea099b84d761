"""The objectives of this package are found by name, like those of any other: nothing imports one
before it is named."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest

from nitp_ops import objectives
from nitp_ops.engine import registry
from nitp_ops.objectives import NITP, SpecError, available, parse, register

SCRIPT = """
import importlib, pkgutil, sys
import nitp_ops.objectives as objectives
homes = {name: f"nitp_ops.objectives.{home.partition(':')[0]}" for name, home in objectives._BUILT_IN.items()}

def loaded():
    return {name for name, home in homes.items() if home in sys.modules}

assert set(objectives.available()) >= set(homes) and not loaded(), loaded()
import nitp_ops.engine
for module in pkgutil.walk_packages(nitp_ops.engine.__path__, "nitp_ops.engine."):
    importlib.import_module(module.name)
assert not loaded(), f"the engine imports {loaded()}"
assert objectives.parse("ntp").terms[0].label == "ntp" and loaded() == {"ntp"}, loaded()
from nitp_ops.objectives import TOP, NextEmbedding
assert loaded() == {"ntp", "top", "next_embedding", "nitp"}, loaded()
assert TOP.name == "top" and objectives.TOP is TOP and nitp_ops.engine.registry.find("top") is TOP
from nitp_ops.objectives import *
assert NITP().name == "nitp" and loaded() == set(homes), set(homes) - loaded()
print("lazy")
"""


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(registry, "_built_in", dict(registry._built_in))


def test_an_objective_is_imported_when_it_is_named_and_by_nothing_else():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "lazy", done.stdout + done.stderr


def test_every_class_is_a_public_name_and_every_other_name_is_none():
    for name, home in objectives._BUILT_IN.items():
        cls = home.partition(":")[2]
        assert (
            cls in objectives.__all__
            and cls in dir(objectives)
            and getattr(objectives, cls).name == name
        )
    with pytest.raises(
        AttributeError,
        match=r"module 'nitp_ops.objectives' has no attribute "
        r"'NTPP'",
    ):
        _ = objectives.NTPP


@pytest.mark.usefixtures("own_registry")
def test_a_built_in_name_is_held_before_its_class_is_imported():
    @dataclass(frozen=True, kw_only=True)
    class Mine(NITP):
        pass

    with pytest.raises(ValueError, match='name is "ntp", expected one that NTP does not hold'):
        register("ntp")(Mine)


@pytest.mark.usefixtures("own_registry")
def test_a_plugin_does_not_take_a_built_in_name(monkeypatch: pytest.MonkeyPatch):
    other = EntryPoint("ntp", "elsewhere:NTP", registry.GROUP)
    monkeypatch.setattr(registry, "_plugins", lambda: {"ntp": other})
    assert registry.plugin_of("ntp") is None
    assert type(parse("ntp").terms[0]).__module__ == "nitp_ops.objectives.tokens.ntp"


@pytest.mark.usefixtures("own_registry")
def test_a_built_in_objective_that_does_not_load_is_shown_when_it_is_named():
    registry.offer("nitp_ops.objectives", {"broken": "no_such_module:Broken"})
    assert "broken" in available() and parse("ntp").terms[0].label == "ntp"
    with pytest.raises(
        SpecError,
        match=r'"broken" is a plugin \(.*no_such_module:Broken\) that '
        r"does not load: Module",
    ):
        parse("ntp + broken")
