"""The table of mutants fits the sources: each edit has its place, changes it, and names tests that exist."""

from __future__ import annotations

import ast

import pytest

from tests.mutants import run


@pytest.mark.parametrize("mutant", run.MUTANTS, ids=lambda m: f"{m.file}: {m.old.splitlines()[0]}")
def test_each_edit_stands_once_in_its_file_and_leaves_it_readable(mutant):
    edited = run.mutated(mutant, (run.ROOT / mutant.file).read_text())
    if mutant.file.endswith(".py"):
        ast.parse(edited)
    for test in run.tests_of(mutant):
        file, _, function = test.partition("::")
        text = (run.ROOT / file).read_text()
        assert not function or f"def {function}(" in text


def test_an_edit_without_its_place_is_told():
    with pytest.raises(
        ValueError, match=r"^objectives/tokens/ntp.py: 'gone' stands there 0 times, expected once$"
    ):
        run.mutated(run.Mutant("objectives/tokens/ntp.py", "gone", "", "objectives_build"), "x = 1")


def test_a_word_that_no_mutant_holds_is_told(capsys):
    assert run.main(["nowhere"]) == 2
    assert capsys.readouterr().out == "mutants: no mutant holds nowhere\n"


def test_a_part_chooses_its_table_and_a_word_what_holds_it():
    assert run.choose(["cpu"]) == list(run.OF_CPU)
    assert run.choose(["cpu", "adapters"]) == [*run.OF_ADAPTERS, *run.OF_CPU]
    assert {m.file for m in run.choose(["objectives/tokens/top.py"])} == {
        "objectives/tokens/top.py"
    }
    assert run.choose([]) == list(run.MUTANTS)


def test_what_kills_fails_with_the_edit_and_passes_without_it(tmp_path, monkeypatch, capsys):
    """On a tree of one module: a test that sees the edit, one that does not, and one that is red anyway."""
    root, temporary = tmp_path / "root", tmp_path / "temporary"
    for folder in (root / "nitp_ops", root / "objectives", root / "tests", temporary):
        folder.mkdir(parents=True)
    (root / "objectives/one.py").write_text("ONE = 1\n")
    (root / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    for name, claim in (("exact", "ONE == 1"), ("loose", "ONE > 0"), ("wrong", "ONE == 3")):
        text = f"from objectives.one import ONE\ndef test_it():\n    assert {claim}\n"
        (root / f"tests/test_{name}.py").write_text(text)
    table = [
        run.Mutant("objectives/one.py", "1", "2", name) for name in ("loose", "wrong", "exact")
    ]
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # the five runs start faster
    monkeypatch.setattr(run, "ROOT", root)
    monkeypatch.setattr(run, "COPIED", ("nitp_ops", "objectives", "tests", "pytest.ini"))
    monkeypatch.setattr(run, "PARTS", {"ones": table})
    monkeypatch.setattr(run.tempfile, "tempdir", str(temporary))
    assert run.main(["exact"]) == 0
    assert "\n1 of 1 mutants killed in " in capsys.readouterr().out
    assert run.main(["loose", "wrong"]) == 1
    first, _, second, why, *left, last = capsys.readouterr().out.splitlines()
    assert first.startswith("1/2 SURVIVED: objectives/one.py: '1' -> '2' (")
    assert second.startswith("2/2 BROKEN: ")
    assert why == "    tests/test_wrong.py::test_it fails without the edit as well"
    assert [line.split(":")[0] for line in left] == ["SURVIVED", "BROKEN"]
    assert last.startswith("0 of 2 mutants killed in ")
    assert list(temporary.iterdir()) == []
    assert (root / "objectives/one.py").read_text() == "ONE = 1\n"
