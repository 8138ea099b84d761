"""Where the streams of a forward pass are found in a module tree: by name, or by structure in a
Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import nn

ModuleLike: TypeAlias = "str | nn.Module"
BlocksLike: TypeAlias = "ModuleLike | Iterable[ModuleLike]"


@dataclass(frozen=True, kw_only=True)
class Sites:
    """Modules that the streams pass; None where not known.

    blocks: in order; what block k + 1 receives is hidden_states[k]. norm: it receives
        last_residual. trunk: it returns
    last_hidden (the final norm, or the body of a model that the head reads). owner: it holds the
    blocks. embed, head: the modules themselves.
    """

    blocks: tuple[nn.Module, ...] | None = None
    norm: nn.Module | None = None
    trunk: nn.Module | None = None
    owner: nn.Module | None = None
    embed: nn.Module | None = None
    head: nn.Module | None = None


def named_sites(
    model: nn.Module,
    *,
    blocks: BlocksLike | None = None,
    norm: ModuleLike | None = None,
    embed: ModuleLike | None = None,
    head: ModuleLike | None = None,
) -> Sites:
    """The modules that were given, by name or as such; the others by structure where the model is a
    Hugging Face one.

    Raises:
        TypeError, ValueError: a name that the model does not have, a thing that is no module.
    """
    found = hugging_face_sites(model) if is_hugging_face(model) else Sites()
    if blocks is not None:
        found = replace(found, blocks=_sequence(model, blocks))
    if norm is not None:
        final = _module(model, "norm", norm)
        found = replace(found, norm=final, trunk=final)
    if embed is not None:
        found = replace(found, embed=_module(model, "embed", embed))
    return found if head is None else replace(found, head=_module(model, "head", head))


def is_hugging_face(model: nn.Module) -> bool:
    """Whether the model offers what a Hugging Face model does."""
    return all(hasattr(model, name) for name in ("config", "base_model", "get_output_embeddings"))


def hugging_face_sites(model: Any) -> Sites:
    """By structure: the body is ``base_model``, the blocks are the first of `block_lists` that has
    ``num_hidden_layers`` modules, the final norm is that beside them."""
    body = model.base_model
    if body is model and hasattr(model, "get_decoder"):
        body = model.get_decoder()
    known = Sites(
        trunk=body, embed=model.get_input_embeddings(), head=model.get_output_embeddings()
    )
    layers = getattr(text_config(model), "num_hidden_layers", None)
    for owner, blocks in block_lists(model):
        if len(blocks) == layers:
            # where the body stands around the decoder, the head may read the decoder's output alone
            return replace(known, blocks=blocks, norm=final_norm(model, owner), owner=owner)
    return known


def block_lists(model: Any) -> list[tuple[nn.Module, tuple[nn.Module, ...]]]:
    """``(module that holds the list, list)`` of every list of modules that may be the blocks, the
    likeliest first.

    Those of the text decoder (a tower for images may be as deep) before any other, those of
    ``num_hidden_layers`` modules before any other, the outermost first.
    """
    layers = getattr(text_config(model), "num_hidden_layers", None)
    found: dict[int, tuple[nn.Module, tuple[nn.Module, ...]]] = {}
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    for root in (decoder, model.base_model):
        if not isinstance(root, nn.Module):
            continue
        lists = []
        for name, module in root.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) and id(module) not in found:
                owner = root.get_submodule(name.rpartition(".")[0])
                lists.append(((len(module) != layers, name.count(".")), owner, module))
        for _, owner, module in sorted(lists, key=lambda entry: entry[0]):
            found[id(module)] = (owner, tuple(module))
    return list(found.values())


def final_norm(model: Any, owner: nn.Module) -> nn.Module | None:
    """The last module beside the blocks with a weight of the hidden size."""
    width = getattr(text_config(model), "hidden_size", None)
    norms = [child for child in owner.children() if _is_norm(child, width)]
    return norms[-1] if norms else None


def head_shape(head: nn.Linear) -> tuple[int, int]:
    """(V, d) of a head's weight. in_features may say V (PEFT's copy of a tied head); ZeRO-3 leaves
    a weight empty."""
    vocab, width = getattr(head.weight, "ds_shape", head.weight.shape)
    return vocab, width


def text_config(model: Any) -> Any:
    """Of a model of text and images the config of its text decoder."""
    return (
        model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    )


def _is_norm(module: nn.Module, width: int | None) -> bool:
    if next(module.children(), None) is not None:
        return False
    weight = getattr(module, "weight", None)
    if weight is None and next(module.parameters(), None) is None:
        return "norm" in type(module).__name__.lower()  # one without parameters, such as OLMo's
    return (
        isinstance(weight, torch.Tensor) and weight.dim() == 1 and width in (weight.numel(), None)
    )


def _module(model: nn.Module, argument: str, given: object) -> nn.Module:
    if isinstance(given, nn.Module):
        return given
    if not isinstance(given, str):
        raise TypeError(
            f"tap: {argument} is a {type(given).__name__}, expected a module or its name"
        )
    try:
        return model.get_submodule(given)
    except AttributeError:
        children = ", ".join(name for name, _ in model.named_children())
        raise ValueError(
            f"tap: {argument} is {given!r}, expected a module of the {type(model).__name__} "
            f"(which has {children})"
        ) from None


def _sequence(model: nn.Module, given: BlocksLike) -> tuple[nn.Module, ...]:
    if isinstance(given, str):
        given = _module(model, "blocks", given)
    if isinstance(given, nn.ModuleDict):
        return tuple(given.values())
    if not isinstance(given, Iterable):
        raise TypeError(
            f"tap: blocks is a {type(given).__name__}, expected a list of modules or its name"
        )
    return tuple(_module(model, "blocks", block) for block in given)
