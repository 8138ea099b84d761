"""The forward of an attached model: it behaves as a bound method, but it goes where
its model goes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

HANDLE = "nitp_handle"


class AttachedForward:
    """Runs the pass of the model's handle.

    A bound method is pickled as the name of its function, and comes back as the forward of the
    class; this comes back as itself, bound to the model that it belongs to. It looks like a method:
    Accelerate wraps ``__func__`` and binds the result to the model again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.__self__ = model
        self.is_of_instance = "forward" in model.__dict__
        plain = plain_forward(model)
        self.__name__, self.__qualname__, self.__doc__ = (
            "forward",
            plain.__qualname__,
            plain.__doc__,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self.__self__, *args, **kwargs)

    @property
    def __func__(self) -> Callable[..., Any]:
        plain = plain_forward(self.__self__)

        def nitp_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _run(self, *args, **kwargs)

        # no __wrapped__: accelerate's unwrap_model(keep_fp32_wrapper=False) installs what it finds
        # at its end; no __module__: it tells Liger's forward from others
        functools.update_wrapper(
            nitp_forward, plain, assigned=("__name__", "__qualname__", "__doc__")
        )
        del nitp_forward.__wrapped__  # type: ignore[attr-defined]
        me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        signature = self.__signature__
        nitp_forward.__signature__ = signature.replace(
            parameters=[me, *signature.parameters.values()]
        )  # type: ignore[attr-defined]
        return nitp_forward

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(plain_forward(self.__self__))


def plain_forward(model: nn.Module) -> Callable[..., Any]:
    """The forward that the model had before it was attached: its own, or that of its class."""
    handle = model.__dict__.get(HANDLE)
    own = None if handle is None else handle._before_attach.get("forward")
    return type(model).forward.__get__(model) if own is None else own


def _run(model: Any, *args: Any, **kwargs: Any) -> Any:
    handle = model.__dict__.get(HANDLE)
    return (
        type(model).forward(model, *args, **kwargs)
        if handle is None
        else handle._pass(args, kwargs)
    )
