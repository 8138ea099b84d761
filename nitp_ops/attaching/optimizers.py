"""Whether the optimizers hold the parameters that are trained: the objective's, and the shards
where a model is cut."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nitp_ops.engine.modules.module_call import is_fully_sharded


def check_optimizers(
    who: str, model: nn.Module, objective: nn.Module, optimizers: Iterable[Optimizer]
) -> None:
    """Refuse optimizers that lack a parameter of the objective, or hold gathered copies of sharded
    ones.

    Between a forward pass and the next backward pass fully_shard leaves gathered tensors in
    ``model.parameters()``. An optimizer made of them steps copies that are dropped
    (pytorch#149205).

    Raises:
        ValueError: names the parameters.
    """
    held = {
        id(p): p
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        if is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]
    gathered = [
        names.get(id(p), f"one of shape {tuple(p.shape)}") for p in held.values() if _is_freed(p)
    ]
    if gathered:
        raise ValueError(
            f"{who}: the optimizer holds gathered copies of sharded parameters "
            f"({_some(gathered)}), expected it to be made right after fully_shard, before any "
            "forward pass (or after model.reshard())"
        )
    lost = [name for name, parameter in objective.named_parameters() if id(parameter) not in held]
    if lost:
        raise ValueError(
            f"{who}: {_some(lost)} of the objective in no group of the optimizer, expected all: it "
            "is made of model.parameters() after attach"
        )


def _is_freed(parameter: Tensor) -> bool:
    """What fully_shard gathers it frees again by resizing its storage."""
    plain = type(parameter) in (nn.Parameter, torch.Tensor)
    return plain and parameter.numel() > 0 and parameter.untyped_storage().size() == 0


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
