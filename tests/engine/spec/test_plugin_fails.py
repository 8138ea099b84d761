"""A plugin that cannot be loaded, for whatever reason, is a line of a SpecError and never the end
of the program."""

from __future__ import annotations

from pathlib import Path

import pytest

from nitp_ops.engine.registry import GROUP
from nitp_ops.objectives import SpecError, available, parse

GOOD = """
from dataclasses import dataclass
from nitp_ops.objectives import NTP

@dataclass(frozen=True, kw_only=True)
class Term(NTP):
    pass
"""
CASES = {
    "exits": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "exits_silently": ("raise SystemExit", "SystemExit"),
    "generator_exit": ("raise GeneratorExit('done')", "GeneratorExit: done"),
    "own_base": ("class Stop(BaseException): pass\nraise Stop('stopped')", "Stop: stopped"),
    "lacks_a_package": ("import no_such_package", "ModuleNotFoundError: No module named "
                                                  "'no_such_package'"),
    "no_python": ("def", "SyntaxError: invalid syntax"),
    "many_lines": ("raise ValueError('one\\ntwo')", r"ValueError: one\ntwo"),
    "no_term": ("", "AttributeError: module 'plugin_no_term' has no attribute 'Term'"),
    "a_number": ("Term = 3", "AttributeError"),
    "a_function": ("def Term(): pass", "TypeError"),
    "an_instance": (GOOD + "\nTerm = Term()", "TypeError"),
    "no_dataclass": ("class Term: pass", "TypeError: register: Term is no frozen dataclass under "
                                         "HeadTerm"),
    "endless": ("def again(): again()\nagain()", "RecursionError: maximum recursion depth "
                                                 "exceeded"),
    "names_itself": ("from nitp_ops.objectives import parse\nparse('names_itself')", "SpecError"),
}  # fmt: skip


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case as an installed package, a good one and one that is interrupted."""
    modules = {name: text for name, (text, _) in CASES.items()}
    modules |= {"good_one": GOOD, "interrupted": "raise KeyboardInterrupt"}
    for name, text in modules.items():
        (tmp_path / f"plugin_{name}.py").write_text(text)
    info = tmp_path / "plugins-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugins\nVersion: 1\n")
    lines = [f"{name} = plugin_{name}:Term" for name in modules]
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]))
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("name", CASES)
def test_the_plugin_and_its_reason_are_named(plugins, name):
    assert name in available()
    with pytest.raises(SpecError) as caught:
        parse(f"ntp + 0.5*{name} + nitp(eps=0)")
    loading, other = caught.value.problems
    assert loading.startswith(
        f'"{name}" is a plugin (plugin_{name}:Term) that does not load: {CASES[name][1]}'
    )
    assert loading.isprintable() and other.startswith("nitp: eps is 0")


def test_a_good_plugin_beside_them_loads(plugins, monkeypatch):
    from nitp_ops.engine import registry

    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    assert parse("good_one").terms[0].name == "good_one"


def test_an_interrupt_while_a_plugin_loads_is_an_interrupt(plugins):
    with pytest.raises(KeyboardInterrupt):
        parse("interrupted")


def test_a_plugin_that_is_installed_later_is_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "late_one" not in available()
    info = tmp_path / "late-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: late\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nlate_one = plugin_late:Term\n")
    assert "late_one" in available()
