"""What `attach` reads off a Hugging Face causal language model, and which models it refuses."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nitp_ops.attaching.hook_points import Sites, head_shape, is_hugging_face, text_config
from nitp_ops.core.checks import is_dtensor
from nitp_ops.objectives import ModelInfo

from .foreign_hooks import refuse_foreign_hooks
from .logit_transform import Transform


def unwrapped(model: nn.Module) -> Any:
    """The Hugging Face model itself: `model`, or what a PeftModel holds.

    Raises:
        TypeError: no Hugging Face model. ValueError: attached already; compiled or wrapped before
            attach.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"attach: model is a {type(model).__name__}, expected a Hugging Face causal language "
            "model"
        )
    for module in model.modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"attach: model is compiled ({type(module).__name__}), expected attach before "
                "compile"
            )
        if "FSDPModule" in _classes(module):
            raise ValueError(
                f"attach: model is sharded ({type(module).__name__}), expected attach before "
                "fully_shard (transformers: load without fsdp_size)"
            )
    if isinstance(
        model, nn.parallel.DistributedDataParallel
    ) or "FullyShardedDataParallel" in _classes(model):
        raise ValueError(
            f"attach: model is a {type(model).__name__}, expected attach before it is wrapped"
        )
    for name, config in (getattr(model, "peft_config", None) or {}).items():  # type: ignore[union-attr]
        if getattr(getattr(config, "peft_type", None), "value", None) == "CPT":
            raise ValueError(
                f"attach: the adapter {name!r} is of the type CPT, whose loss PEFT makes from the "
                "logits, expected one that leaves the loss to the model, such as prompt tuning "
                "(in training there are no logits)"
            )
    plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not is_hugging_face(plain):
        raise TypeError(
            f"attach: model is a {type(plain).__name__}, expected a Hugging Face causal language "
            "model (any other: tap)"
        )
    if getattr(plain.config, "is_encoder_decoder", False):
        raise ValueError(
            f"attach: model is a {type(plain).__name__}, an encoder-decoder whose labels are those "
            "of their own position, expected a causal language model"
        )
    for module in model.modules():
        if (
            module is not plain
            and getattr(module.__dict__.get("forward"), "__self__", None) is plain
        ):
            raise ValueError(
                f"attach: the {type(module).__name__} around the model calls a forward of it that "
                "it has kept, expected one that calls the model"
            )
    if hasattr(plain, "nitp_objective"):
        raise ValueError("attach: model has an objective already, expected handle.detach() first")
    return plain


def head_of(model: Any) -> nn.Module | None:
    """The head that computes now: where PEFT trains a copy of it (modules_to_save), the copy of the
    active adapter."""
    return active_copy(model.get_output_embeddings())


def active_copy(head: Any) -> nn.Module | None:
    """The head itself, or the copy of it that PEFT trains and that is active."""
    copies = getattr(head, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return head
    active = head.active_adapters
    off = head.disable_adapters or not active or any(name not in copies for name in active)
    return head.original_module if off else copies[active[0]]


def virtual_tokens(model: Any) -> int:
    """How many virtual tokens a PeftModel puts before each row now; those of prefix tuning are keys
    of a cache."""
    config = getattr(model, "active_peft_config", None)
    if (
        config is None
        or not config.is_prompt_learning
        or config.peft_type.value in ("PREFIX_TUNING", "CARTRIDGE")
    ):
        return 0
    return config.num_virtual_tokens


def refuse_hooks_on_head(head: nn.Module | None) -> None:
    """See that only an engine has hooks on the head, or on the module that PEFT replaced it by.

    Args:
        head: the model's output embeddings.

    Raises:
        ValueError: somebody has; the hook is named.
    """
    for module in (head, active_copy(head)):
        if module is not None:
            refuse_foreign_hooks(module)


def checked_head(head: nn.Module | None) -> nn.Linear:
    """The head, if the objective can read its weight.

    Raises:
        ValueError: no head, an adapter, a quantised, sharded, offloaded or replaced one: the reason
            is named.
    """
    if head is None:
        raise ValueError(
            "attach: model has no output embeddings, expected a causal language model with a head"
        )
    kind, weight = type(head).__name__, getattr(head, "weight", None)
    inside = ", ".join(name for name, _ in head.named_children())
    if inside:
        reason = f"is a {kind} with submodules {inside}, expected a plain linear (an adapter is more than its weight)"
    elif _is_offloaded(head):
        reason = "is offloaded by accelerate (device_map), expected its weight on the device that it computes on"
    elif not is_linear_call(head):
        reason = f"is a {kind} with a forward of its own, expected a plain linear (quantised heads differ)"
    elif not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
        reason = f"has a weight of {got}, expected a floating point dtype (a quantised head gets no gradient)"
    elif is_dtensor(weight):
        reason = "has a DTensor weight, expected attach before fully_shard"
    elif is_traceable_wrapper_subclass(weight):
        reason = f"has a weight that is a {type(weight).__name__}, expected a plain tensor (quantised heads differ)"
    else:
        return head  # type: ignore[return-value]
    raise ValueError(f"attach: the model's head {reason}")


def is_linear_call(head: nn.Module) -> bool:
    """Whether a call of the head is that of nn.Linear, whatever class or engine stands around it."""
    kind = type(head)
    plain = kind.forward is nn.Linear.forward and kind.__call__ is nn.Module.__call__
    return plain and ("forward" not in head.__dict__ or _is_aligned(head))


def _device_hooks(head: nn.Module) -> list[Any]:
    """accelerate's, which replace the forward of every module under a device_map."""
    hook = head.__dict__.get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _is_offloaded(head: nn.Module) -> bool:
    return any(getattr(hook, "offload", False) for hook in _device_hooks(head))


def _is_aligned(head: nn.Module) -> bool:
    """Whether the forward was replaced by what moves inputs to the weight's device, and by nothing
    else."""
    hooks = _device_hooks(head)
    own = getattr(head.__dict__.get("_old_forward"), "__func__", None)
    return own is nn.Linear.forward and all(
        type(hook).__name__ == "AlignDevicesHook" for hook in hooks
    )


def model_info(model: Any, sites: Sites, transform: Transform) -> ModelInfo:
    """Sizes from the head and the blocks; objectives get parameters of the head's dtype."""
    head, config = sites.head, model.config
    assert isinstance(head, nn.Linear)
    vocab, width = head_shape(head)
    return ModelInfo(
        hidden_size=width,
        vocab_size=vocab,
        # where neither the modules nor the config say it, no hidden state is known by its number
        num_layers=len(sites.blocks)
        if sites.blocks
        else getattr(text_config(model), "num_hidden_layers", None) or 1,
        softcap=transform.softcap,
        logit_scale=transform.logit_scale,
        dtype=head.weight.dtype,
        initializer_range=float(getattr(config, "initializer_range", None) or 0.02),
        sequence_length=getattr(config, "max_position_embeddings", None),
    )


def _classes(model: nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(model).__mro__}
