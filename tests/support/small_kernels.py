"""Counts the small kernels of a call: what a GPU would launch beside GEMMs, for tensors that hold
anything."""

from __future__ import annotations

from collections import Counter

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.core.without_reading import OWN, inside

GEMMS = {"mm", "addmm", "addmm_", "gemm_"}
#: Make memory and leave its numbers, or ask for a dtype.
WITHOUT_NUMBERS = {
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "populate_",
    "promote_types",
}
#: One for the rows, one for what depends on all of them.
TWO = {"prepare_rows_"}


class SmallKernels(TorchDispatchMode):
    """Entered, counts by operator, also inside the library's own."""

    def __init__(self) -> None:
        super().__init__()
        self.launched = Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in OWN:
            return inside(self, func, args, kwargs)
        result, name = func(*args, **kwargs), func._schema.name.partition("::")[2]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        writes = any(
            each.alias_info is not None and each.alias_info.is_write
            for each in func._schema.arguments
        )
        memory = {x.untyped_storage().data_ptr() for x in given}
        made = any(
            isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in memory
            for x in tree_leaves(result)
        )
        empty = bool(given) and all(x.numel() == 0 for x in given)
        if name not in GEMMS | WITHOUT_NUMBERS and (writes or made) and not empty:
            self.launched[name] += 2 if name in TWO else 1
        return result
