"""Computing inside the ``__call__`` of a module: its hooks run around it and touch nothing of it.

    tensors -> fork -> ticket -> the module's pre-hooks  -> join -> use
    results <- join <- the module's hooks <- ticket <- fork <- use

Engines gather parameters before a forward and reduce their gradients after a backward in hooks that
watch the tensors that enter and leave, and some cast every float among them
(`MixedPrecisionPolicy`), be it a weight or a loss. So the hooks see a ticket alone, one zero. Its
gradient is formed after those of everything that entered with it, and before anything that left
with it is differentiated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils._pytree import tree_flatten, tree_unflatten

_T = TypeVar("_T")


def opened(module: nn.Module, values: Sequence[Any], use: Callable[..., _T]) -> _T:
    """``use(*values)`` where the parameters of a head or a projector may be read: inside its call
    if that has hooks."""
    return inside_call(module, values, use) if has_hooks(module) else use(*values)


def inside_call(module: nn.Module, values: Sequence[Any], use: Callable[..., _T]) -> _T:
    """``use(*values)``, computed where `module` would run its forward.

    values: tensors, and whatever else. use: returns a tensor, or tuples, lists and dicts of tensors
        and other things.
    A gradient to anything that it reads beside the values and the module's parameters is not waited
    for.
    """
    ticket, entered = _fork(values)
    if _is_grouped(module):
        # where the root's forward has ended, FSDP2 would take the end of this call's backward for
        # that of the group
        ticket = ticket.detach()
    left: list[Any] = []

    def forward(ticket: Tensor) -> Tensor:
        results, structure = tree_flatten(use(*_join(ticket, entered)))
        ticket, results = _fork(results)
        left[:] = results, structure
        return ticket

    call = super(Sealed, module).__call__ if isinstance(module, Sealed) else module
    with _routed(module, forward):
        ticket = call(ticket)
    results, structure = left
    return tree_unflatten(_join(ticket, results), structure)


class Sealed(nn.Module):
    """A module whose arguments and results keep their dtypes under `fully_shard`, whatever the
    policy says.

    Its hooks see a ticket in place of them; without `fully_shard` they see what they always do.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_fully_sharded(self):
            return super().__call__(*args, **kwargs)
        forward = self.forward
        values, structure = tree_flatten((args, kwargs))

        def use(*values: Any) -> Any:
            args, kwargs = tree_unflatten(list(values), structure)
            return forward(*args, **kwargs)

        return inside_call(self, values, use)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs more than its forward."""
    own = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    return bool(
        own
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether FSDP2's hooks are on the module; where torch.distributed.fsdp was never imported they
    are not."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _is_grouped(module: nn.Module) -> bool:
    """Whether it is one of several modules of a group, as in ``fully_shard([norm, head])``."""
    return is_fully_sharded(module) and len(module._get_fsdp_state()._modules) > 1  # type: ignore[operator, union-attr]


@contextmanager
def _routed(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.forward = own


def _fork(values: Sequence[Any]) -> tuple[Tensor, list[Any]]:
    """(the ticket, the values): differentiable tensors among them leave with the ticket."""
    found = [x for x in values if isinstance(x, Tensor) and x.requires_grad]
    if not found or not torch.is_grad_enabled():
        device = next((x.device for x in values if isinstance(x, Tensor)), None)
        return torch.zeros(1, device=device), list(values)
    ticket, *found = _Fork.apply(*found)  # type: ignore[misc]
    return ticket, _replaced(values, found)


def _join(ticket: Tensor, values: Sequence[Any]) -> list[Any]:
    """The values, behind the ticket."""
    if not ticket.requires_grad:
        return list(values)
    found = [x for x in values if isinstance(x, Tensor) and x.requires_grad]
    return _replaced(values, _Join.apply(ticket, *found))  # type: ignore[arg-type]


def _replaced(values: Sequence[Any], found: Sequence[Tensor]) -> list[Any]:
    others = iter(found)
    return [next(others) if isinstance(x, Tensor) and x.requires_grad else x for x in values]


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.zeros(1, device=tensors[0].device), *(x.view_as(x) for x in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients[1:]


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ticket: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.device, ctx.dtype = inputs[0].device, inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return torch.zeros(1, device=ctx.device, dtype=ctx.dtype), *gradients
