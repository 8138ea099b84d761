"""What `attach` reads off a Hugging Face causal language model, and which models it refuses."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nitp_ops.objectives import ModelInfo
from nitp_ops.objectives.dtensor import is_dtensor

from .head_transform import Transform
from .sites import Sites, is_hugging_face


def unwrapped(model: nn.Module) -> Any:
    """The Hugging Face model itself: `model`, or what a PeftModel holds.

    Raises:
        TypeError: no Hugging Face model. ValueError: attached already; compiled or wrapped before attach.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach: model is a {type(model).__name__}, expected a Hugging Face causal language model")
    for module in model.modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"attach: model is compiled ({type(module).__name__}), expected attach before compile")
    if isinstance(model, nn.parallel.DistributedDataParallel) or "FullyShardedDataParallel" in _classes(model):
        raise ValueError(f"attach: model is a {type(model).__name__}, expected attach before it is wrapped")
    plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not is_hugging_face(plain):
        raise TypeError(
            f"attach: model is a {type(plain).__name__}, expected a Hugging Face causal language model (any other: tap)"
        )
    if hasattr(plain, "nitp_objective"):
        raise ValueError("attach: model has an objective already, expected handle.detach() first")
    return plain


def head_of(model: Any) -> nn.Module | None:
    """The head that computes now: where PEFT trains a copy of it (modules_to_save), the copy."""
    head = model.get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict) and not head.disable_adapters:
        return copies[head.active_adapters[0]]
    return head


def checked_head(head: nn.Module | None) -> nn.Linear:
    """The head, if the objective can read its weight.

    Raises:
        ValueError: no head, an adapter, a quantised, sharded or replaced one: the reason is named.
    """
    if head is None:
        raise ValueError("attach: model has no output embeddings, expected a causal language model with a head")
    kind, weight = type(head).__name__, getattr(head, "weight", None)
    inside = ", ".join(name for name, _ in head.named_children())
    if inside:
        reason = f"is a {kind} with submodules {inside}, expected a plain linear (an adapter is more than its weight)"
    elif type(head).forward is not nn.Linear.forward or "forward" in head.__dict__:
        reason = f"is a {kind} with a forward of its own, expected a plain linear (quantised heads differ)"
    elif not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        came = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
        reason = f"has a weight of {came}, expected a floating point dtype (a quantised head gets no gradient)"
    elif is_dtensor(weight):
        reason = "has a DTensor weight, expected attach before fully_shard"
    else:
        return head  # type: ignore[return-value]
    raise ValueError(f"attach: the model's head {reason}")


def model_info(model: Any, sites: Sites, transform: Transform) -> ModelInfo:
    """Sizes from the head and the blocks; objectives get parameters of the head's dtype."""
    head, config = sites.head, model.config
    assert isinstance(head, nn.Linear)
    return ModelInfo(
        hidden_size=head.in_features,
        vocab_size=head.out_features,
        num_layers=len(sites.blocks) if sites.blocks is not None else config.num_hidden_layers,
        softcap=transform.softcap,
        logit_scale=transform.logit_scale,
        dtype=head.weight.dtype,
        initializer_range=float(getattr(config, "initializer_range", None) or 0.02),
        sequence_length=getattr(config, "max_position_embeddings", None),
    )


def _classes(model: nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(model).__mro__}
