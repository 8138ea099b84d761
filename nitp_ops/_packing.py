"""The schema and the flat arguments of a custom op, derived from the NamedTuples that its function takes."""

from __future__ import annotations

from collections.abc import Sequence
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
}


class Packing:
    """Some NamedTuples of the kind `several` and one of the kind `one`, as arguments of a custom op.

    An option that becomes a field of either is thereby an argument of the op: of `several` field by field as lists,
    then those of `one`. A field of `one` that is a NamedTuple or None stands as its own fields, all of which may be
    None.
    """

    def __init__(self, several: Any, one: Any):
        self.several, self.one = several, one
        hints = get_type_hints(one)
        nested = {name: [each for each in get_args(hint) if hasattr(each, "_fields")] for name, hint in hints.items()}
        self.nested: dict[str, Any] = {name: found[0] for name, found in nested.items() if found}

    def schema(self, rest: str, returns: str) -> str:
        """Of the op; `rest` are its other arguments."""
        declared = [f"{kind}[] each_{name}" for name, kind in _declared(self.several)]
        for name, hint in get_type_hints(self.one).items():
            if name in self.nested:
                declared += [f"{kind}? {name}_{inner}" for inner, kind in _declared(self.nested[name])]
            else:
                declared.append(f"{_TYPES[hint]} {name}")
        return f"({', '.join([*declared, rest])}) -> {returns}"

    def pack(self, several: Sequence[Any], one: Any) -> list[Any]:
        packed: list[Any] = [list(column) for column in zip(*several, strict=True)]
        for name, value in zip(self.one._fields, one, strict=True):
            if name in self.nested:
                fields = [None] * len(self.nested[name]._fields) if value is None else value
                packed += [list(each) if isinstance(each, tuple) else each for each in fields]
            else:
                packed.append(value)
        return packed

    def unpack(self, packed: Sequence[Any]) -> tuple[list[Any], Any]:
        """What `pack` was given."""
        width = len(self.several._fields)
        rows, fields, values = zip(*packed[:width], strict=True), iter(packed[width:]), []
        for name in self.one._fields:
            if name in self.nested:
                inner = [next(fields) for _ in self.nested[name]._fields]
                inner = [tuple(each) if isinstance(each, list) else each for each in inner]
                values.append(None if inner[0] is None else self.nested[name](*inner))
            else:
                values.append(next(fields))
        return [self.several(*row) for row in rows], self.one(*values)


def tensor_fields(kind: type) -> tuple[str, ...]:
    """Names of the fields that may hold a tensor."""
    return tuple(name for name, hint in get_type_hints(kind).items() if hint in (Tensor, Tensor | None))


def _declared(kind: type) -> list[tuple[str, str]]:
    return [(name, _TYPES[hint]) for name, hint in get_type_hints(kind).items()]
