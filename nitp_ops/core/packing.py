"""The schema and flat arguments of a custom op, derived from the types of its function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    int | None: "int?",
    float: "float",
    str: "str",
    torch.dtype: "ScalarType",
    tuple[int, ...]: "int[]",
    tuple[bool, ...]: "bool[]",
}


class Packing:
    """Some values of the type `several` (None: of none) and one of each of `ones`, as arguments of
    a custom op.

    All are dataclasses or NamedTuples; an option that becomes a field of one is thereby an argument
    of the op: those of `several` field by field as lists, then those of `ones`, whose names differ.
    A field that is itself a NamedTuple or None stands as its own fields, all of which may be None.
    """

    def __init__(self, several: type | None, *ones: Any):
        self.several, self.ones = several, ones
        self.nested: dict[str, Any] = {}
        for kind in ones:
            for name, hint in get_type_hints(kind).items():
                found = [each for each in get_args(hint) if hasattr(each, "_fields")]
                if found:
                    self.nested[name] = found[0]
        self.names = () if several is None else names_of(several)

    def schema(self, returns: str) -> str:
        declared = []
        if self.several is not None:
            declared = [f"{kind}[] each_{name}" for name, kind in _declared(self.several)]
        for one in self.ones:
            for name, hint in _hints(one):
                if name in self.nested:
                    inner = _declared(self.nested[name])
                    declared += [f"{kind}? {name}_{field}" for field, kind in inner]
                else:
                    declared.append(f"{_TYPES[hint]} {name}")
        return f"({', '.join(declared)}) -> {returns}"

    def index_of(self, name: str) -> int:
        """The position of the field among the arguments."""
        before = list(self.names)
        for one in self.ones:
            for field in one._fields:
                inner = self.nested.get(field)
                before += [field] if inner is None else [""] * len(inner._fields)
        return before.index(name)

    def pack(self, *values: Any) -> list[Any]:
        """values: a sequence of those of `several`, and then the others."""
        several, ones = ((), values) if self.several is None else (values[0], values[1:])
        packed: list[Any] = [[getattr(each, name) for each in several] for name in self.names]
        for one in ones:
            for name, value in zip(one._fields, one, strict=True):
                if name in self.nested:
                    inner = [None] * len(self.nested[name]._fields) if value is None else value
                    packed += [_listed(each) for each in inner]
                else:
                    packed.append(_listed(value))
        return packed

    def unpack(self, packed: Sequence[Any]) -> tuple[Any, ...]:
        """The values that `pack` was given."""
        rest = iter(packed)
        columns = [next(rest) for _ in self.names]
        rows = [dict(zip(self.names, row, strict=True)) for row in zip(*columns, strict=True)]
        ones = [] if self.several is None else [[self.several(**row) for row in rows]]
        for one in self.ones:
            values = []
            for name in one._fields:
                if name in self.nested:
                    inner = [_tupled(next(rest)) for _ in self.nested[name]._fields]
                    values.append(None if inner[0] is None else self.nested[name](*inner))
                else:
                    values.append(_tupled(next(rest)))
            ones.append(one(*values))
        return tuple(ones)


def names_of(kind: Any) -> tuple[str, ...]:
    return kind._fields if hasattr(kind, "_fields") else tuple(field.name for field in fields(kind))


def tensor_fields(kind: type) -> tuple[str, ...]:
    """Names of the fields that may hold a tensor."""
    return tuple(name for name, hint in _hints(kind) if hint in (Tensor, Tensor | None))


def _hints(kind: type) -> list[tuple[str, Any]]:
    hints = get_type_hints(kind)
    return [(name, hints[name]) for name in names_of(kind)]


def _declared(kind: type) -> list[tuple[str, str]]:
    return [(name, _TYPES[hint]) for name, hint in _hints(kind)]


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
