"""Reading the weight of a head or an embedding where it may be read: inside the ``__call__`` of its
module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from nitp_ops import reference
from nitp_ops.core.checks import is_dtensor
from nitp_ops.engine.streams.model_info import ModelInfo

from .module_call import has_hooks, opened

_T = TypeVar("_T")

#: Where tensor-parallel styles come from: torch wraps a forward in hooks, transformers replaces it.
_STYLES = ("torch.distributed.tensor._api", "transformers.distributed.tensor_parallel")


def through_head(
    head: nn.Module | Tensor,
    hidden: Sequence[Tensor],
    use: Callable[[Sequence[Tensor], Tensor, Tensor | None], _T],
    *,
    takes_shards: bool = False,
) -> _T:
    """``use(hidden, weight, bias)`` of a module with weight ``[V, d]`` and perhaps a bias, or of a
    leaf ``[V, d]``.

    A module with hooks is called, so that they run, and ``use`` runs where its forward would: FSDP
    gathers the weight before and reduces its gradient after. Hooks see neither hidden states nor
    results, see `inside_call`. A group of modules such as [norm, head] counts calls: whatever reads
    a head in a step does so in one call of this function.

    Args:
        takes_shards: where a tensor-parallel style (torch's ColwiseParallel, or a ``tp_plan`` of
            transformers) sharded the vocabulary of the module, ``use`` gets its weight and bias as
            DTensors with Shard(0). The style's own translation of inputs and outputs is left out
            for that call: ``hidden`` is plain, and the same on all ranks of the mesh.

    Raises:
        TypeError, ValueError: no such head; a DTensor or a non-leaf tensor (a gathered copy), whose
            gradient would be wrong without an error; a module with submodules, such as an adapter,
            whose weight is not what it computes.
    """
    if isinstance(head, Tensor):
        return use(hidden, _leaf("head", head), None)
    if not isinstance(head, nn.Module) or not isinstance(getattr(head, "weight", None), Tensor):
        raise TypeError(
            f"objective: head is a {type(head).__name__}, expected a module with a weight, or a "
            "tensor"
        )
    if inside := [name for name, module in head._modules.items() if module is not None]:
        raise ValueError(
            f"objective: head is a {type(head).__name__} with submodules {', '.join(inside)}, "
            "expected a plain linear"
        )
    styled = _is_tensor_parallel(head)
    sharded = takes_shards and styled

    def read(*hidden: Tensor) -> _T:
        weight: Tensor = head.weight  # type: ignore[assignment]
        if not sharded:
            _plain("head", weight)
        return use(hidden, weight, getattr(head, "bias", None))

    with _without_styles(head) if styled and has_hooks(head) else nullcontext():
        return opened(head, hidden, read)


def logits(head: nn.Module | Tensor, hidden: Tensor, info: ModelInfo) -> Tensor:
    """The model's logits ``[..., V]`` of hidden states ``[..., d]``, in float32 (float64 for
    float64)."""

    def use(hidden: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference.transformed_logits(hidden[0], weight, bias, info.softcap, info.logit_scale)

    return through_head(head, [hidden], use)


def embedded(embed: nn.Module | Tensor, ids: Tensor) -> Tensor:
    """E(ids) ``[..., d]`` by the module's own ``__call__`` (its hooks run, a scale of its own
    counts), or of a leaf.

    Raises:
        TypeError, ValueError: no module and no tensor; a DTensor or a non-leaf tensor, as in
            `through_head`.
    """
    if isinstance(embed, Tensor):
        return F.embedding(ids, _leaf("embed", embed))
    if not isinstance(embed, nn.Module):
        raise TypeError(
            f"objective: embed is a {type(embed).__name__}, expected a module, or a tensor"
        )
    return embed(ids)


@contextmanager
def _without_styles(head: nn.Module) -> Iterator[None]:
    """torch's tensor-parallel styles translate between plain tensors and DTensors in hooks, around
    a GEMM that does not run here."""
    registered: list[dict[int, Any]] = [head._forward_pre_hooks, head._forward_hooks]
    kept = [dict(hooks) for hooks in registered]
    for hooks in registered:
        for key in [key for key, hook in hooks.items() if _is_style(hook)]:
            del hooks[key]
    try:
        yield
    finally:
        for hooks, before in zip(registered, kept, strict=True):
            hooks.clear()
            hooks.update(before)


def _is_style(hook: Callable[..., Any] | None) -> bool:
    return getattr(hook, "__module__", None) in _STYLES


def _is_tensor_parallel(head: nn.Module) -> bool:
    """A sharded weight alone says nothing: FSDP's own shards look the same outside the forward that
    gathers them."""
    hooks = [
        *head._forward_pre_hooks.values(),
        *head._forward_hooks.values(),
        head.__dict__.get("forward"),
    ]
    return any(map(_is_style, hooks))


def _leaf(name: str, weight: Tensor) -> Tensor:
    if not weight.is_leaf:
        raise ValueError(
            f"objective: {name} is a non-leaf tensor, expected the module that owns "
            "the weight, or a leaf"
        )
    return _plain(name, weight)


def _plain(name: str, weight: Tensor) -> Tensor:
    if is_dtensor(weight):
        raise TypeError(
            f"objective: {name}'s weight is a DTensor, expected a plain tensor inside "
            "the module's forward"
        )
    return weight
