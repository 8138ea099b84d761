"""Hooks of others on a head: in training there are no logits that they could see or change.

Engines hook every module to gather its weight, move its inputs or watch for overflow; those keep
working, for a head is called through its hooks. A hook of anybody else is refused by name: a mask
or a temperature would be lost without an error.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as nn_module

from nitp_ops.engine.modules.module_call import has_hooks

_ENGINES = (
    "torch.distributed", "transformers", "accelerate", "deepspeed", "peft", "trl", "lightning", "pytorch_lightning",
    "torch.utils.module_tracker", "nitp_ops",
)  # fmt: skip
_KINDS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}


def refuse_foreign_hooks(head: nn.Module) -> None:
    """See that only an engine has hooks on a head, or on every module.

    Raises:
        ValueError: somebody has; the hook is named.
    """
    if not has_hooks(head):
        return
    for kind, name in _foreign_hooks(head):
        raise ValueError(
            f"attach: the model's head has a {kind} {name}, expected none: in training there are "
            "no logits for it to see or change; remove it (softcap and logit scale are read off "
            "the model's forward)"
        )


def _foreign_hooks(module: nn.Module) -> Iterator[tuple[str, str]]:
    for registered, kind in _KINDS.items():
        of_every_module = getattr(nn_module, f"_global{registered}")
        for hooks, scope in ((getattr(module, registered), ""), (of_every_module, "global ")):
            for hook in hooks.values():
                package, name = _origin(hook)
                if not any(
                    package == engine or package.startswith(f"{engine}.") for engine in _ENGINES
                ):
                    yield f"{scope}{kind}", name


def _origin(hook: Any) -> tuple[str, str]:
    """(module, name) of a function, a bound method, a partial or a callable object."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    if not hasattr(hook, "__qualname__"):
        hook = type(hook)
    return hook.__module__ or "", f"{hook.__module__}.{hook.__qualname__}"
