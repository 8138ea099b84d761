"""What is wrong with a value: one error for all problems, type checks of dataclass fields, "Did you
mean"."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import reprlib
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

#: Problems that the message of a SpecError shows.
_SHOWN = 50
#: Most tokens ahead, as of an offset or a window: more than any sequence has, exact in float32.
MOST_AHEAD = 2**20
#: Most objectives of one spec.
MOST_TERMS = 100
#: Most heads or modules of one term.
MOST_HEADS = 64


class SpecError(ValueError):
    """Everything that is wrong with a spec, in one error.

    Attributes:
        problems: one line each, in the order in which they were found.

    Example:
        >>> str(SpecError(["nitp: eps is -1, expected a number > 0"]))
        'nitp: eps is -1, expected a number > 0'
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(map(one_line, problems))
        head = "" if len(self.problems) == 1 else f"{len(self.problems)} problems in the spec:\n  "
        shown = self.problems[:_SHOWN]
        rest = [f"and {len(self.problems) - _SHOWN} more"] if len(self.problems) > _SHOWN else []
        super().__init__(head + "\n  ".join([*shown, *rest]))


class _Bounded(reprlib.Repr):
    """repr that ends: of long, deep and recursive values, and of integers that Python refuses to
    write out."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 4, 100, 100
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 16

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 300 else f"an integer of {x.bit_length()} bits"


def one_line(text: str) -> str:
    """The text as a line of a terminal: what cannot be printed (line breaks, lone surrogates) is
    escaped, words of more than 120 letters are cut."""
    printed = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
    return re.sub(r"\S{120,}", lambda word: f"{word[0][:100]}...{word[0][-1]}", printed)


def shown(value: object) -> str:
    """Any value as a message names it: its repr, on one line, cut where it is long or deep.

    Example:
        >>> shown([[[[[[1]]]]]]), shown(10**5000)
        ('[[[[[...]]]]]', 'an integer of 16610 bits')
    """
    return one_line(" ".join(_Bounded().repr(value).split()))


def too_many_terms(count: int) -> str:
    """The line that refuses more than `MOST_TERMS`, in whichever spelling."""
    return f"the spec has {count} terms, expected at most {MOST_TERMS}"


def suggestion(word: object, known: Iterable[str]) -> str:
    """`` Did you mean "..."?`` or, where nothing is close, the empty string."""
    close = difflib.get_close_matches(word, list(known), n=1) if isinstance(word, str) else []
    return f' Did you mean "{close[0]}"?' if close else ""


def listing(values: Iterable[object]) -> str:
    """The values as a spec writes them: strings in double quotes, separated by commas."""
    return ", ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in values)


def is_int(value: object) -> bool:
    """An int that is not a bool, and that a tensor of int64 holds."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def of_64_bits(value: object) -> str:
    """`` of 64 bits`` where a value is, or holds, an integer that int64 can not: what a message
    then adds to what it expected. Else the empty string.

    Example:
        >>> f"expected an integer{of_64_bits(2**63)}", of_64_bits(2**62), of_64_bits([1, 2**63])
        ('expected an integer of 64 bits', '', ' of 64 bits')
    """
    values = value if isinstance(value, list | tuple) else [value]
    return (
        " of 64 bits"
        if any(isinstance(item, int) and not -(2**63) <= item < 2**63 for item in values)
        else ""
    )


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Resolved type of each dataclass field."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def type_problem(name: str, value: object, expected: Any) -> str | None:
    """One line if ``value`` is not of the type ``expected``, else None.

    Understands Literal, int, float (an int will do; never NaN or infinity), bool, str, None, unions
    and ``tuple[X, ...]``; a bool is no number. Other types are tested with isinstance.
    """
    if _fits(value, expected):
        return None
    got = f'"{value}"' if isinstance(value, str) else shown(value)
    choices = [choice for choice in _alternatives(expected) if get_origin(choice) is Literal]
    allowed = [word for choice in choices for word in get_args(choice)]
    hint = (
        suggestion(value, [word for word in allowed if isinstance(word, str)])
        if isinstance(value, str)
        else ""
    )
    numbers = of_64_bits(value) if {int, float} & set(_members(expected)) else ""
    return f"{name} is {got}, expected {type_name(expected)}{numbers}" + (
        f".{hint}" if hint else ""
    )


def number_problem(name: str, value: float, low: float, *, inclusive: bool = True) -> str | None:
    """One line if ``value`` is below ``low`` (or, not inclusive, equal to it), else None."""
    if value > low or (inclusive and value == low):
        return None
    return f"{name} is {value}, expected a number {'>=' if inclusive else '>'} {low:g}"


def count_problem(name: str, value: int, low: int, high: int) -> str | None:
    """One line if ``value`` is outside [low, high], else None."""
    return (
        None
        if low <= value <= high
        else f"{name} is {value}, expected an integer in [{low}, {high}]"
    )


def coerce(value: Any, expected: Any) -> Any:
    """A value of the right type in its one form: lists become tuples, an int in a float field a
    float."""
    if isinstance(value, list):
        return tuple(value)
    return float(value) if expected is float and is_int(value) else value


def _alternatives(expected: Any) -> Sequence[Any]:
    return get_args(expected) if get_origin(expected) in (Union, types.UnionType) else (expected,)


def _members(expected: Any) -> Iterator[Any]:
    """The types that a type is made of: of ``tuple[int, ...] | None`` int and None."""
    if get_origin(expected) in (tuple, Union, types.UnionType):
        for part in get_args(expected):
            yield from _members(part)
    else:
        yield expected


def _fits(value: object, expected: Any) -> bool:
    origin = get_origin(expected)
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in get_args(expected))
    if origin is Literal:
        return any(type(value) is type(word) and value == word for word in get_args(expected))
    if origin is tuple:
        return isinstance(value, list | tuple) and all(
            _fits(item, get_args(expected)[0]) for item in value
        )
    if expected is float:
        return is_int(value) or (isinstance(value, float) and math.isfinite(value))
    if expected is int:
        return is_int(value)
    if expected is None:
        return value is None
    return isinstance(value, expected)


def type_name(expected: Any) -> str:
    """A type as error messages and pages name it."""
    origin = get_origin(expected)
    if origin is Literal:
        return f"one of {listing(get_args(expected))}"
    if origin is tuple:
        # "an integer" -> "integers"
        return f"a list of {type_name(get_args(expected)[0]).split(maxsplit=1)[-1]}s"
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(choice) for choice in get_args(expected))
    names = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "a string",
        type(None): "null",
    }
    return names.get(expected, getattr(expected, "__name__", str(expected)))
