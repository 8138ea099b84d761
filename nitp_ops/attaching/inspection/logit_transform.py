"""What a Hugging Face model does between its head and its logits, found by running its own code on
chosen numbers.

The body and the head are replaced for one call by functions that return known tensors, so that the
call costs nothing, reads no parameter, and works on the meta device and under any sharding.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nitp_ops.attaching.hook_points import Sites, head_shape

from .loss_function import check_loss_function
from .routing import routed

_SMALL, _LARGE = 2.0**-10, 1e30
_VALUES = [
    sign * value
    for value in (_SMALL, 0.1, 0.5, 1.0, 2.0, 7.0, 30.0, 100.0, 1000.0, _LARGE)
    for sign in (1, -1)
]


class _Body:
    """What the body returns: a last hidden state, and None for whatever else is read."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, key: int | slice) -> Any:
        return () if isinstance(key, slice) else (self.last_hidden_state if key == 0 else None)


class Transform(NamedTuple):
    """``logits = softcap tanh(logit_scale W h / softcap)``, h what `body` returns; without a cap
    softcap is None."""

    body: nn.Module
    softcap: float | None
    logit_scale: float


class _Seen(NamedTuple):
    """One call: its output, what the head was given, and the logits and labels that the loss was
    given."""

    out: Any
    hidden: list[Tensor]
    losses: list[tuple[Any, Any]]


class _AnotherBody(ValueError):
    """The head does not read what this body returns."""


def head_transform(model: Any, forward: Callable[..., Any], sites: Sites) -> Transform:
    """The transform of the model's own code. A factor on h before a head without bias is part of
    logit_scale.

    Args:
        model: the model. forward: its own forward, called as ``forward(**kwargs)``. sites: its body
            and its head.

    Raises:
        ValueError: the head does not read what the body returns; the logits are another function of
            what the head returns, or of each column another one; the forward can not leave the
            logits out; its loss does not go through ``model.loss_function``, on the logits and
            labels of the call, or is none of next tokens.
    """
    assert sites.trunk is not None and isinstance(sites.head, nn.Linear)
    # a forward may reach past a body that stands around the decoder (OPT, Llama 4, Bart)
    bodies = [
        sites.trunk,
        sites.owner,
        model.get_decoder() if hasattr(model, "get_decoder") else None,
    ]
    refusals: list[ValueError] = []
    for body in dict.fromkeys(body for body in bodies if isinstance(body, nn.Module)):
        try:
            return _measured(model, forward, body, sites.head)
        except _AnotherBody as error:
            refusals.append(error)
    if between := _modules_between(model, forward, sites.trunk, sites.head):
        raise ValueError(
            f"attach: the {type(model).__name__}'s head reads what {between[0]} makes of the "
            "body's last hidden state, expected one that reads that state itself"
        ) from refusals[0]
    raise ValueError(str(refusals[0])) from refusals[0]


def _modules_between(
    model: Any, forward: Callable[..., Any], body: nn.Module, head: nn.Linear
) -> list[str]:
    """Names of the modules with parameters of their own that a call runs before the head and
    outside the body."""
    known, called = {*body.modules(), *head.modules()}, []

    def run(name: str) -> Callable[..., None]:
        return lambda *_: called.append(name)

    hooks = [
        module.register_forward_pre_hook(run(name))
        for name, module in model.named_modules()
        if module not in known
        and next(module.parameters(recurse=False), None) is not None
        # what holds the head is called before it too
        and head not in module.modules()
    ]
    try:
        _measured(model, forward, body, head)
    except ValueError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return called


def _measured(
    model: Any, forward: Callable[..., Any], body: nn.Module, head: nn.Linear
) -> Transform:
    def probed(rows: int, z: Tensor, **kwargs: Any) -> _Seen:
        """A call on so many rows; the head returns the first rows of z."""
        hidden: list[Tensor] = []
        losses: list[tuple[Any, Any]] = []

        def of_head(given: Tensor) -> Tensor:
            hidden.append(given)
            return z[:, : given.shape[-2]].clone()

        def of_body(*args: Any, **kwargs: Any) -> _Body:
            return _Body(h[:, :rows])

        def of_loss(logits: Any = None, labels: Any = None, *args: Any, **kwargs: Any) -> Tensor:
            losses.append((logits, labels))
            return torch.zeros(())

        with torch.no_grad(), routed(body, of_body), routed(head, of_head), _loss(model, of_loss):
            return _Seen(_called(model, forward, input_ids=ids[:, :rows], **kwargs), hidden, losses)

    z = torch.tensor(_VALUES, dtype=torch.float64).view(1, -1, 1)
    vocab, width = head_shape(head)
    h, ids = _distinct(len(_VALUES), width), torch.zeros(1, len(_VALUES), dtype=torch.long)
    seen = probed(len(_VALUES), z)
    factor = _factor(h, seen.hidden, head)
    softcap, scale = _fitted(z.flatten(), seen.out.logits)
    # whole rows: a column that is masked, and a loss that is computed in the forward
    seen = probed(2, torch.ones(1, 2, vocab, dtype=torch.float64), labels=ids[:, :2])
    _check_loss(model, seen, vocab, head.weight.device)
    _check_columns(
        seen.out.logits,
        (1, 2, vocab),
        scale if softcap is None else softcap * math.tanh(scale / softcap),
    )
    seen = probed(len(_VALUES), z, labels=ids, logits_to_keep=torch.empty(0, dtype=torch.long))
    if seen.out.logits.numel() or seen.hidden[0].numel():
        raise ValueError(
            "attach: the model's forward builds logits without logits_to_keep, expected none for "
            "no rows"
        )
    if not torch.isfinite(seen.out.loss).all():
        raise ValueError(
            "attach: the model adds a loss of its logits to its loss, expected none "
            "(no logits are built)"
        )
    return Transform(body, softcap, scale * factor)


def _check_loss(model: Any, seen: _Seen, vocab: int, device: torch.device) -> None:
    if not seen.losses:
        raise ValueError(
            f"attach: the {type(model).__name__}'s loss does not go through model.loss_function, "
            "expected one that does (its forward computes it)"
        )
    logits, labels = seen.losses[0]
    if [getattr(logits, "shape", ())[-1:], getattr(labels, "shape", None)] != [
        (vocab,),
        (1, 2),
    ] or len(logits[0]) != 2:
        got = [
            tuple(value.shape) if isinstance(value, Tensor) else value for value in (logits, labels)
        ]
        raise ValueError(
            f"attach: the {type(model).__name__}'s loss gets logits {got[0]} and labels "
            f"{got[1]}, expected those of the call, {(1, 2, vocab)} and (1, 2)"
        )
    check_loss_function(model, device)


def _check_columns(logits: Tensor, shape: tuple[int, ...], expected: float) -> None:
    if tuple(logits.shape) != shape:
        raise ValueError(
            f"attach: the model's logits have shape {tuple(logits.shape)}, expected {shape}"
        )
    wrong = ~torch.isclose(
        logits[0, 0].double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4
    )
    if wrong.any():
        raise ValueError(
            f"attach: the model's forward masks or shifts {int(wrong.sum())} columns of its "
            f"logits, the first {int(wrong.nonzero()[0])}, expected the same function of every "
            "column"
        )


def _called(model: Any, forward: Callable[..., Any], **kwargs: Any) -> Any:
    names = inspect.signature(forward).parameters
    if "output_router_logits" in names:
        kwargs["output_router_logits"] = False  # the body that is replaced here has none
    if "skip_logits" in names:  # Liger-Kernel's forward: else it computes a loss of its own
        kwargs["skip_logits"] = False
    try:
        return forward(**kwargs, use_cache=False, return_dict=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise _AnotherBody(
            f"attach: model is a {type(model).__name__} whose forward fails on a body's output "
            f"alone ({reason}), expected logits that are a function of the body's last hidden state"
        ) from error


def _distinct(rows: int, width: int) -> Tensor:
    """[1, rows, width] of powers of two, exact in every dtype; a norm or a projection of a row is
    no multiple of it."""
    position = torch.arange(rows).view(-1, 1) + torch.arange(width)
    power = position % 5 + torch.arange(rows).view(-1, 1) % 3 - 3
    return (torch.ones(1, rows, width, dtype=torch.float64) * 2.0**power) * (
        1 - 2.0 * (position % 2)
    )


def _factor(h: Tensor, seen: list[Tensor], head: nn.Linear) -> float:
    if len(seen) != 1 or seen[0].shape != h.shape or seen[0].is_meta:
        got = (
            f"{len(seen)} calls"
            if len(seen) != 1
            else f"a hidden state of shape {tuple(seen[0].shape)}"
        )
        raise _AnotherBody(
            f"attach: the model's head gets {got}, expected one call with what the model's body "
            "returns"
        )
    ratio = seen[0].double() / h
    factor = ratio.flatten()[0].item()
    if not torch.allclose(ratio, ratio.new_tensor(factor), rtol=1e-2) or factor <= 0:
        raise _AnotherBody(
            "attach: the model's head reads something else than its body returns, expected the same"
        )
    if factor != 1 and head.bias is not None:
        raise ValueError(f"attach: the model's head has a bias and reads {factor:g} h, expected h")
    return factor


def _fitted(z: Tensor, logits: Tensor) -> tuple[float | None, float]:
    def at(value: float) -> float:
        return logits.flatten()[_VALUES.index(value)].item()

    if tuple(logits.shape) != (1, len(_VALUES), 1):
        got = tuple(logits.shape)
        raise ValueError(
            f"attach: the model's logits have shape {got} of a head of one column, "
            "expected [B, T, 1]"
        )
    softcap = at(_LARGE) if abs(at(_LARGE)) < math.sqrt(_LARGE) else None
    scale = at(1.0)
    if softcap is not None and 0 < at(_SMALL) < softcap:
        scale = softcap * math.atanh(at(_SMALL) / softcap) / _SMALL
        # the logits may have been rounded to float32 on the way
        scale = 1.0 if abs(scale - 1) < 1e-4 else scale
    expected = scale * z if softcap is None else softcap * torch.tanh(scale * z / softcap)
    if not torch.allclose(logits.flatten().double(), expected, rtol=1e-4, atol=1e-6) or scale <= 0:
        raise ValueError(
            "attach: the model's logits are no scale and softcap of what its head returns, "
            "expected softcap * tanh(logit_scale * head(h) / softcap)"
        )
    return softcap, scale


@contextmanager
def _loss(model: Any, function: Callable[..., Tensor]) -> Iterator[None]:
    own = model.__dict__.get("_loss_function")
    model.loss_function = function
    try:
        yield
    finally:
        model.__dict__.pop("_loss_function", None)
        if own is not None:
            model._loss_function = own
