"""The objective's own parameters stay out of the state dict of the model that holds it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .attached_model import OBJECTIVE
from .inspection.hugging_face import head_of


def leave_out(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """A hook after ``module.state_dict()``."""
    for name in list(state):
        if name.startswith(f"{prefix}{OBJECTIVE}."):
            del state[name]


def expect_none(module: Any, keys: Any) -> None:
    """A hook after ``module.load_state_dict()``."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if f".{OBJECTIVE}." not in f".{key}"]
    # a program that refills a model from the meta device has no values for what is not in its
    # state dict
    weight = getattr(head_of(module), "weight", None)
    if isinstance(weight, Tensor) and not weight.is_meta:
        getattr(module, OBJECTIVE).materialize(weight.device)
