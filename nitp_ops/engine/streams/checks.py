"""Dtypes and shapes of `Streams`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nitp_ops.engine.spec.validation import is_int, of_64_bits

if TYPE_CHECKING:
    from .streams import Streams

_TOKEN_FIELDS = (
    "token_ids",
    "labels",
    "shift_labels",
    "document_ids",
    "attention_mask",
    "target_mask",
    "token_weight",
)
_INTEGER_FIELDS = (
    "token_ids",
    "labels",
    "shift_labels",
    "document_ids",
    "position_ids",
    "cu_seqlens",
)


def checked_shape(streams: Streams) -> tuple[int, int]:
    """(B, T) of the token streams, which all streams fit."""
    shape = tuple((streams.tokens if streams.token_ids is None else streams.token_ids).shape)
    if len(shape) != 2:
        raise ValueError(f"Streams: the token streams have shape {shape}, expected [B, T]")
    for name in _TOKEN_FIELDS:
        value = getattr(streams, name)
        if value is not None and value.shape != shape:
            raise ValueError(f"Streams: {name} has shape {tuple(value.shape)}, expected {shape}")
    positions, lengths = streams.position_ids, streams.cu_seqlens
    if positions is not None and tuple(positions.shape) not in (shape, (1, shape[1])):
        raise ValueError(
            f"Streams: position_ids has shape {tuple(positions.shape)}, expected {shape} or (1, T)"
        )
    if lengths is not None and (lengths.dim() != 1 or lengths.numel() < 2):
        raise ValueError(
            f"Streams: cu_seqlens has shape {tuple(lengths.shape)}, expected (documents + 1,)"
        )
    classes = streams.class_weight
    if classes is not None and classes.dim() != 1:
        raise ValueError(f"Streams: class_weight has shape {tuple(classes.shape)}, expected (V,)")
    if streams.shard is not None and shape[1] != streams.shard.length:
        raise ValueError(
            f"Streams: the token streams have shape {shape}, expected all {streams.shard.length} "
            "tokens"
        )
    part = shape if streams.shard is None else (shape[0], streams.shard.size)
    for name, value in streams.hidden_streams().items():
        if value.dim() != 3 or value.shape[:2] != part:
            raise ValueError(
                f"Streams: {name} has shape {tuple(value.shape)}, expected {(*part, 'd')}"
            )
    return shape  # type: ignore[return-value]


def check_dtypes(streams: Streams) -> None:
    for name in _INTEGER_FIELDS:
        value = getattr(streams, name)
        if value is not None and (value.is_floating_point() or value.dtype == torch.bool):
            raise TypeError(f"Streams: {name} is {value.dtype}, expected an integer dtype")
    mask, target_mask, weight = streams.attention_mask, streams.target_mask, streams.token_weight
    if mask is not None and mask.is_floating_point():
        raise TypeError(
            f"Streams: attention_mask is {mask.dtype}, expected bool or an integer dtype"
        )
    if target_mask is not None and target_mask.dtype != torch.bool:
        raise TypeError(f"Streams: target_mask is {target_mask.dtype}, expected torch.bool")
    for name, given in (("token_weight", weight), ("class_weight", streams.class_weight)):
        if given is not None and not given.is_floating_point():
            raise TypeError(f"Streams: {name} is {given.dtype}, expected a floating point dtype")


def external_pair(streams: Streams, name: str) -> tuple[Tensor, Tensor]:
    """(sum, count) of a loss that the model computed itself, 0-d; the count int64."""
    given = streams.external[name]
    total, count = given if isinstance(given, tuple) and len(given) == 2 else (given, 1)
    if not isinstance(total, Tensor) or total.dim() > 0 or not total.is_floating_point():
        raise TypeError(
            f"Streams: external[{name}] is {_described(given)}, expected a 0-d float "
            "sum, or (sum, count)"
        )
    if isinstance(count, int) and is_int(count):
        number = torch.full((), count, dtype=torch.int64, device=streams.device)
        return total.to(streams.device), number
    if not isinstance(count, Tensor) or not _is_count(count):
        raise TypeError(
            f"Streams: external[{name}] has the count {_described(count)}, expected an "
            f"integer{of_64_bits(count)}"
        )
    return total.to(streams.device), count.detach().to(streams.device, torch.int64)


def check_label_layout(function: str, layout: object) -> None:
    """
    Raises:
        ValueError: it is no label layout.
    """
    if layout not in ("document", "stream"):
        given = f'"{layout}"' if isinstance(layout, str) else repr(layout)
        raise ValueError(f'{function}: label_layout is {given}, expected "document" or "stream"')


def _is_count(value: Tensor) -> bool:
    integers = not value.is_floating_point() and value.dtype != torch.bool
    return value.dim() == 0 and integers


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return repr(value)
