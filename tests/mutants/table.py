"""What a mutant is: one edit of one file, and the tests that it must turn red."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Mutant(NamedTuple):
    """A file, its text (once in it), what stands there instead, and the tests that must fail.

    tests: words; "ops/numerics" is tests/ops/test_numerics.py, "ops/numerics::function" one test.
    """

    file: str
    old: str
    new: str
    tests: str


def mutants(edits: Mapping[str, Sequence[tuple[str, str, str]]]) -> tuple[Mutant, ...]:
    """The edits (old, new, tests) of each file."""
    return tuple(Mutant(file, *edit) for file, of_file in edits.items() for edit in of_file)
