"""Bytes that the operators of a call read and write, counted by the sizes of the tensors that they
are given."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.core.without_reading import OWN, inside

#: Make memory and leave its numbers.
WITHOUT_NUMBERS = {
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "populate_",
}
#: Arguments that are overwritten without being read.
OVERWRITTEN = {
    "copy_": {"self"}, "zero_": {"self"}, "fill_": {"self"}, "mm": {"out"}, "swiglu_rows": {"out"},
    "scale_rows_": {"out"}, "prepare_rows_": {"scale", "totals", "stats", "target_logit", "prediction"},
    "finish_rows_": {"loss"},
}  # fmt: skip


class BytesMoved(TorchDispatchMode):
    """Entered, counts by operator, also inside the library's own; tensors of less than `least`
    numbers are left out."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.moved = least, Counter[str]()

    def total(self) -> int:
        return sum(self.moved.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in OWN:
            return inside(self, func, args, kwargs)
        result, name = func(*args, **kwargs), func._schema.name.partition("::")[2]
        a_view = any(
            each.alias_info is not None and not each.alias_info.is_write
            for each in func._schema.returns
        )
        if name in WITHOUT_NUMBERS or a_view:
            return result
        given = (
            dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
        )
        read, written = _split(name, func._schema, given)
        if all(each.alias_info is None for each in func._schema.returns):
            written += tree_leaves(result)
        self.moved[name] += sum(
            x.nbytes for x in read + written if isinstance(x, Tensor) and x.numel() >= self.least
        )
        return result


def _split(name: str, schema: Any, given: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """(tensors that are read, tensors that are written) of the arguments."""
    in_place = name == "scale_rows_" and given.get("out", given["rows"]) is given["rows"]
    if in_place and given["factor"] == 1:
        return [], []  # one touches nothing
    if in_place:
        return [given["rows"], given["factor"]], [given["rows"]]
    overwritten = {"out"} if name == "gemm_" and not given["add"] else OVERWRITTEN.get(name, set())
    marked = {
        each.name
        for each in schema.arguments
        if each.alias_info is not None and each.alias_info.is_write
    }
    if name == "scale_rows_":
        marked = {"out"}
    if name == "cross_entropy_rows_" and not given["gradient"]:
        marked = marked - {"logits"}
    read = [
        leaf
        for argument, value in given.items()
        if argument not in overwritten
        for leaf in tree_leaves(value)
    ]
    return read, [leaf for argument in marked & set(given) for leaf in tree_leaves(given[argument])]
