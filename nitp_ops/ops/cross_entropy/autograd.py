"""Autograd of the token losses: a plain autograd.Function, and the custom op that tracing needs
around the same pass.

The gradients of a scalar loss are computed in the forward pass (`chunked.py`); the backward pass
multiplies them by the upstream. Per-row losses are computed again under their upstream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import reference
from ...core.dispatch import needs_dispatcher
from ...core.gemm import gemm_policy
from ...core.packing import Packing, tensor_fields
from ...core.weight_gradient import WeightGemm
from ...kernels import select
from ..gradients import PendingGradients, pending_dtype, refuse_vmap, scaled_gradients
from .chunked import Call, forward_and_gradients
from .stats import RowValues
from .term import CrossEntropyTerm, Unembedding


def token_pass(
    terms: Sequence[CrossEntropyTerm], unembedding: Unembedding, backend: str,
    logits_dtype: torch.dtype | str, *, reduction: str = "sum", normalizer: Any = None,
    entropy: bool = False, grouped: bool = False,
) -> tuple[Tensor, RowValues]:  # fmt: skip
    """(loss, values); loss = sum over terms and rows of row weight * row loss, or of one term their
    mean, or each."""
    weight, bias = unembedding.weight, unembedding.bias
    hidden = [term.hidden for term in terms]
    policy = gemm_policy(unembedding.op, weight, hidden, logits_dtype)
    differentiate = torch.is_grad_enabled() and reduction != "none"
    call = Call(
        backend=backend,
        dtype=policy.dtype,
        logits=policy.logits,
        reduction=reduction,
        normalizer=as_tensor(normalizer, weight),
        entropy=entropy,
        grouped=grouped,
        want_hidden=tuple(differentiate and x.requires_grad for x in hidden),
        want_weight=differentiate and weight.requires_grad,
        want_bias=differentiate and bias is not None and bias.requires_grad,
    )
    if needs_dispatcher((*hidden, weight, bias, *(term.labels for term in terms))):
        loss, *values, _ = _token_pass(*PACKING.pack(terms, unembedding, call))
    else:
        loss, *values = LinearCrossEntropyFunction.apply(
            terms, unembedding, call, *hidden, weight, bias
        )
    stats, prediction, target_logit = values
    return loss, RowValues(stats.detach(), prediction, target_logit.detach())


def as_tensor(normalizer: Any, weight: Tensor) -> Tensor | None:
    """0-d in the working precision, where the weight is; filled there, so that no copy waits for
    the device."""
    if normalizer is None:
        return None
    work = reference.working(weight)
    if isinstance(normalizer, Tensor):
        return normalizer.to(weight.device, work)
    # torch.full would make a constant of it while tracing, and compile anew for each value
    return torch.ones((), dtype=work, device=weight.device) * normalizer


PACKING = Packing(CrossEntropyTerm, Unembedding, Call)
_RETURNS = "(Tensor loss, Tensor stats, Tensor prediction, Tensor target_logit, Tensor[] gradients)"


@torch.library.custom_op("nitp_ops::token_pass", mutates_args=(), schema=PACKING.schema(_RETURNS))
def _token_pass(*packed):
    loss, values, gradients = forward_and_gradients(*PACKING.unpack(packed), plain=False)
    return loss, *values, gradients


@_token_pass.register_fake
def _(*packed):
    terms, unembedding, call = PACKING.unpack(packed)
    weight, work = unembedding.weight, reference.working(unembedding.weight)
    # neither len nor Size.numel: they would make a dynamic number of rows a constant
    count = sum(math.prod(term.leading) for term in terms)
    targets = sum(term.labels.numel() for term in terms)
    gradients = [
        x.new_empty(x.shape, dtype=pending_dtype(x, buffer))
        for x, buffer in _leaves(terms, unembedding, call)
    ]
    loss = weight.new_empty(terms[0].leading if call.reduction == "none" else (), dtype=work)
    stats = weight.new_empty((3 if call.entropy else 2, count), dtype=work)
    return (
        loss,
        stats,
        terms[0].labels.new_empty(count),
        weight.new_empty(targets, dtype=work),
        gradients,
    )


class Leaf(NamedTuple):
    """An input whose gradient is wanted, and the buffer that takes it."""

    tensor: Tensor
    buffer: Tensor | None


def _leaves(terms: Sequence[CrossEntropyTerm], unembedding: Unembedding, call: Call) -> list[Leaf]:
    """In the order of the gradients."""
    wanted = zip(terms, call.want_hidden, strict=True)
    leaves = [Leaf(term.hidden, term.hidden_grad_out) for term, flag in wanted if flag]
    if call.want_weight:
        leaves.append(Leaf(unembedding.weight, unembedding.weight_grad_out))
    if call.want_bias and unembedding.bias is not None:
        leaves.append(Leaf(unembedding.bias, None))
    return leaves


#: What is saved. Not the buffers: each backward pass writes to them, which a saved tensor forbids.
_BUFFERS = ("hidden_grad_out", "weight_grad_out")
_OF_TERM = tuple(name for name in tensor_fields(CrossEntropyTerm) if name not in _BUFFERS)
_OF_UNEMBEDDING = tuple(name for name in tensor_fields(Unembedding) if name not in _BUFFERS)
_NOT_SAVED = tuple(field.name for field in fields(CrossEntropyTerm) if field.name not in _OF_TERM)


def _save(
    ctx, terms: Sequence[CrossEntropyTerm], unembedding: Unembedding, call: Call,
    gradients: Sequence[Tensor | WeightGemm],
) -> None:  # fmt: skip
    of_terms = [getattr(term, name) for term in terms for name in _OF_TERM]
    of_head = [getattr(unembedding, name) for name in _OF_UNEMBEDDING]
    ctx.save_for_backward(*of_terms, *of_head, call.normalizer)
    ctx.set_materialize_grads(False)
    ctx.terms = [{name: getattr(term, name) for name in _NOT_SAVED} for term in terms]
    ctx.unembedding = unembedding._replace(weight=None, bias=None)
    ctx.call = call._replace(normalizer=None)
    ctx.pending = PendingGradients(gradients)


def _saved(ctx) -> tuple[list[CrossEntropyTerm], Unembedding, Call, list[Tensor]]:
    """What was saved; read once: checkpointing allows no second time."""
    tensors = ctx.saved_tensors
    rest = iter(tensors)
    terms = [
        CrossEntropyTerm(**{name: next(rest) for name in _OF_TERM}, **others)
        for others in ctx.terms
    ]
    unembedding = ctx.unembedding._replace(**{name: next(rest) for name in _OF_UNEMBEDDING})
    call = ctx.call._replace(normalizer=next(rest))
    return terms, unembedding, call, [x for x in tensors if x is not None]


def _recompute(
    terms: Sequence[CrossEntropyTerm], unembedding: Unembedding, call: Call, tensors: list[Tensor]
) -> list[Tensor | WeightGemm]:
    with torch.no_grad():
        if needs_dispatcher(tensors):
            return _token_pass(*PACKING.pack(terms, unembedding, call))[-1]
        return forward_and_gradients(terms, unembedding, call, plain=True)[-1]


def _gradients(ctx, needed: Sequence[bool], upstream: Tensor | None) -> list[Tensor | None]:
    """Of hidden..., unembedding and bias; `needed` of them."""
    if upstream is None:
        return [None] * len(needed)
    terms, unembedding, call, tensors = _saved(ctx)
    rest: Tensor | None = upstream
    if call.reduction == "none":  # the upstream enters the weights of the rows
        (term,), (want_hidden, want_weight, want_bias) = terms, needed
        given = term.token_weight
        weight = upstream
        if given is not None:  # a NaN beside a zero reaches no row
            product = given.to(upstream.dtype) * upstream
            weight = torch.where((given == 0) | (upstream == 0), 0, product)
        terms, rest = [replace(term, token_weight=weight)], None
        call = call._replace(
            reduction="sum",
            want_hidden=(want_hidden,),
            want_weight=want_weight,
            want_bias=want_bias,
        )
        gradients = _recompute(terms, unembedding, call, tensors)
    else:
        gradients = ctx.pending.pop(upstream, lambda: _recompute(terms, unembedding, call, tensors))
    pending = list[Any]()
    for gradient, leaf in zip(gradients, _leaves(terms, unembedding, call), strict=True):
        if isinstance(gradient, WeightGemm):
            with torch.no_grad():  # also under create_graph: a buffer has no graph
                gradient.run(rest, select.row_kernels(call.backend))
            call = call._replace(want_weight=False)
        else:
            pending.append((gradient, *leaf))
    double_backward_inputs = [x for x in (*tensors, upstream) if x.requires_grad]
    scaled = scaled_gradients(double_backward_inputs, unembedding.op, call.backend, pending, rest)
    rest_of = iter(scaled)
    wanted = (*call.want_hidden, call.want_weight, call.want_bias)
    return [next(rest_of) if flag else None for flag in wanted]


class LinearCrossEntropyFunction(torch.autograd.Function):
    """The pass outside tracing, subclasses and dispatch modes."""

    @staticmethod
    def forward(
        ctx,
        terms: Sequence[CrossEntropyTerm],
        unembedding: Unembedding,
        call: Call,
        *_leaves: Tensor | None,
    ) -> tuple[Tensor, ...]:
        loss, values, gradients = forward_and_gradients(terms, unembedding, call, plain=True)
        _save(ctx, terms, unembedding, call, gradients)
        ctx.mark_non_differentiable(*values)
        return loss, *values

    @staticmethod
    def backward(ctx, upstream: Tensor | None, *_) -> tuple[Tensor | None, ...]:
        return None, None, None, *_gradients(ctx, ctx.needs_input_grad[3:], upstream)


def _save_traced(ctx, inputs, output) -> None:
    # detached: an op's own outputs would tie its context into a reference cycle
    terms, unembedding, call = PACKING.unpack(inputs)
    _save(ctx, terms, unembedding, call, [gradient.detach() for gradient in output[-1]])
    ctx.mark_non_differentiable(*output[1:-1], *output[-1])
    # autograd expects a list of None for a list of tensors, and one None for anything else
    ctx.without = [[None] * len(x) if _is_tensor_list(x) else None for x in inputs]


def _is_tensor_list(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(each, Tensor) for each in x)


#: Where the op takes hidden..., unembedding and bias.
_POSITIONS = tuple(PACKING.index_of(name) for name in ("hidden", "weight", "bias"))


def _differentiate_traced(ctx, upstream: Tensor | None, *_):
    of_hidden, *of_head = (ctx.needs_input_grad[place] for place in _POSITIONS)
    *d_hidden, d_weight, d_bias = _gradients(ctx, [*of_hidden, *of_head], upstream)
    gradients = list(ctx.without)
    for place, gradient in zip(_POSITIONS, (d_hidden, d_weight, d_bias), strict=True):
        gradients[place] = gradient
    return tuple(gradients)


_token_pass.register_vmap(refuse_vmap(PACKING.index_of("op")))
_token_pass.register_autograd(_differentiate_traced, setup_context=_save_traced)
