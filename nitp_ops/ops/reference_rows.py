"""The formula behind ``backend="reference"``: like kernels it leaves rows out whose upstream
gradient is zero.

Autograd would multiply: zero times the NaN of such a row is NaN, also in the gradients that all
rows share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: (rows that are wanted, or None for all; the differentiable tensors) -> the losses.
_Formula = Callable[..., Tensor]


def of_active_rows(formula: _Formula, *tensors: Tensor | None) -> Tensor:
    """``formula(None, *tensors)``; its gradients are those of ``formula(upstream != 0, *tensors)``.

    formula: gives rows that are not wanted the loss 0, and reads nothing of them. tensors: all that
        get a gradient.
    """
    stack = torch._C._functorch.peek_interpreter_stack()  # type: ignore[attr-defined]
    if stack is not None or torch.compiler.is_compiling():
        return formula(None, *tensors)
    return _ActiveRows.apply(formula, *tensors)  # type: ignore[return-value]


class _ActiveRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, formula: _Formula, *tensors: Tensor | None) -> Tensor:
        ctx.formula = formula
        ctx.save_for_backward(*tensors)
        return formula(None, *tensors)

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = upstreams
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # views: one tensor may be given twice, and gets a gradient for each
            tensors = [None if x is None else x.view_as(x) for x in ctx.saved_tensors]
            needed = ctx.needs_input_grad[1:]
            wanted = [x for x, flag in zip(tensors, needed, strict=True) if flag and x is not None]
            losses = ctx.formula(upstream != 0, *tensors)
        if losses.requires_grad:
            found = torch.autograd.grad(
                losses, wanted, upstream, create_graph=again, materialize_grads=True
            )
        else:  # no row is left
            found = [torch.zeros_like(x) for x in wanted]
        gradients = iter(found)
        return None, *(next(gradients) if flag else None for flag in needed)
