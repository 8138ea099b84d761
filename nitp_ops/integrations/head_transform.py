"""What a Hugging Face model does between its head and its logits, found by running its own code on chosen numbers.

The body and the head are replaced for one call by functions that return known tensors, so that the call costs nothing,
reads no parameter, and works on the meta device and under any sharding.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .sites import Sites

_SMALL, _LARGE = 2.0**-10, 1e30
_VALUES = [sign * value for value in (_SMALL, 0.1, 0.5, 1.0, 2.0, 7.0, 30.0, 100.0, 1000.0, _LARGE) for sign in (1, -1)]


class _Body:
    """What the body returns: a last hidden state, and None for whatever else is asked for."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, key: int | slice) -> Any:
        return () if isinstance(key, slice) else (self.last_hidden_state if key == 0 else None)


class Transform(NamedTuple):
    """``logits = softcap tanh(logit_scale W h / softcap)``, h what `body` returns; without a cap softcap is None."""

    body: nn.Module
    softcap: float | None
    logit_scale: float


def head_transform(model: Any, forward: Callable[..., Any], sites: Sites) -> Transform:
    """The transform of the model's own code. A factor on h before a head without bias is part of logit_scale.

    Args:
        model: the model. forward: its own forward, called as ``forward(**kwargs)``. sites: its body and its head.

    Raises:
        ValueError: the head does not read what the body returns; the logits are another function of what the head
            returns; the forward can not leave the logits out; its loss does not go through ``model.loss_function``.
    """
    assert sites.trunk is not None and isinstance(sites.head, nn.Linear)
    try:
        return _measured(model, forward, sites.trunk, sites.head)
    except ValueError:
        if sites.owner is None or sites.owner is sites.trunk:
            raise
        # the forward reaches past a body that stands around the decoder (OPT, Llama 4)
        return _measured(model, forward, sites.owner, sites.head)


def _measured(model: Any, forward: Callable[..., Any], body: nn.Module, head: nn.Linear) -> Transform:
    z = torch.tensor(_VALUES, dtype=torch.float64).view(1, -1, 1)
    h = _distinct(len(_VALUES), head.in_features)
    ids = torch.zeros(1, len(_VALUES), dtype=torch.long)
    seen: list[Tensor] = []

    def of_head(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return z[:, : hidden.shape[-2]].clone()

    def of_body(*args: Any, **kwargs: Any) -> _Body:
        return _Body(h)

    def of_loss(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(torch.empty(0))
        return torch.zeros(())

    with torch.no_grad(), _routed(body, of_body), _routed(head, of_head):
        logits = _called(model, forward, input_ids=ids).logits
        factor = _factor(h, seen, head)
        softcap, scale = _fitted(z.flatten(), logits)
        seen.clear()
        with _loss(model, of_loss):
            nothing = torch.empty(0, dtype=torch.long)
            out = _called(model, forward, input_ids=ids, labels=ids, logits_to_keep=nothing)
    if out.logits.numel() or seen[0].numel():
        raise ValueError("attach: the model's forward builds logits without logits_to_keep, expected none for no rows")
    if len(seen) != 2:
        raise ValueError("attach: the model's loss does not go through model.loss_function, expected one that does")
    if not torch.isfinite(out.loss).all():
        raise ValueError("attach: the model adds a loss of its logits to its loss, expected none (no logits are built)")
    return Transform(body, softcap, scale * factor)


def _called(model: Any, forward: Callable[..., Any], **kwargs: Any) -> Any:
    if "output_router_logits" in inspect.signature(forward).parameters:
        kwargs["output_router_logits"] = False  # the body that is replaced here has none
    try:
        return forward(**kwargs, use_cache=False, return_dict=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ValueError(
            f"attach: model is a {type(model).__name__} whose forward fails on a body's output alone ({reason}), "
            "expected logits that are a function of the body's last hidden state"
        ) from error


def _distinct(rows: int, width: int) -> Tensor:
    """[1, rows, width] of powers of two, exact in every dtype; a norm or a projection of a row is no multiple of it."""
    place = torch.arange(rows).view(-1, 1) + torch.arange(width)
    power = place % 5 + torch.arange(rows).view(-1, 1) % 3 - 3
    return (torch.ones(1, rows, width, dtype=torch.float64) * 2.0**power) * (1 - 2.0 * (place % 2))


def _factor(h: Tensor, seen: list[Tensor], head: nn.Linear) -> float:
    if len(seen) != 1 or seen[0].shape != h.shape or seen[0].is_meta:
        came = f"{len(seen)} calls" if len(seen) != 1 else f"a hidden state of shape {tuple(seen[0].shape)}"
        raise ValueError(f"attach: the model's head gets {came}, expected one call with what the model's body returns")
    ratio = seen[0].double() / h
    factor = ratio.flatten()[0].item()
    if not torch.allclose(ratio, ratio.new_tensor(factor), rtol=1e-2) or factor <= 0:
        raise ValueError("attach: the model's head reads something else than its body returns, expected the same")
    if factor != 1 and head.bias is not None:
        raise ValueError(f"attach: the model's head has a bias and reads {factor:g} h, expected h")
    return factor


def _fitted(z: Tensor, logits: Tensor) -> tuple[float | None, float]:
    def at(value: float) -> float:
        return logits.flatten()[_VALUES.index(value)].item()

    if logits.shape[:2] != (1, len(_VALUES)):
        raise ValueError(f"attach: the model's logits have shape {tuple(logits.shape)}, expected [B, T, V]")
    softcap = at(_LARGE) if abs(at(_LARGE)) < math.sqrt(_LARGE) else None
    scale = at(1.0)
    if softcap is not None and 0 < at(_SMALL) < softcap:
        scale = softcap * math.atanh(at(_SMALL) / softcap) / _SMALL
        scale = 1.0 if abs(scale - 1) < 1e-4 else scale  # the logits may have been rounded to float32 on the way
    expected = scale * z if softcap is None else softcap * torch.tanh(scale * z / softcap)
    if not torch.allclose(logits.flatten().double(), expected, rtol=1e-4, atol=1e-6) or scale <= 0:
        raise ValueError(
            "attach: the model's logits are no scale and softcap of what its head returns, expected "
            "softcap * tanh(logit_scale * head(h) / softcap)"
        )
    return softcap, scale


@contextmanager
def _routed(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """`module` computes `function`; whatever stood in its place comes back."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = function
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


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
