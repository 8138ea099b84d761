"""The table of mutants fits the sources: each edit has its place, changes it, and names tests that exist."""

from __future__ import annotations

import ast

import mutants
import pytest


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: f"{m.file}: {m.old.splitlines()[0]}")
def test_each_edit_stands_once_in_its_file_and_leaves_it_readable(mutant):
    edited = mutants.mutated(mutant, (mutants.ROOT / mutant.file).read_text())
    if mutant.file.endswith(".py"):
        ast.parse(edited)
    for test in mutants.tests_of(mutant):
        file, _, function = test.partition("::")
        text = (mutants.ROOT / file).read_text()
        assert not function or f"def {function}(" in text


def test_an_edit_without_its_place_is_told():
    with pytest.raises(ValueError, match=r"^objectives/ntp.py: 'gone' stands there 0 times, expected once$"):
        mutants.mutated(mutants.Mutant("objectives/ntp.py", "gone", "", "objectives_build"), "x = 1")


def test_a_word_that_no_mutant_holds_is_told(capsys):
    assert mutants.main(["nowhere"]) == 2
    assert capsys.readouterr().out == "mutants: no mutant holds nowhere\n"
