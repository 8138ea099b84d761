"""Which document a token belongs to: ``document_ids[b, t] >= 0``, or < 0 for padding."""

from __future__ import annotations

import torch
from torch import Tensor

from nitp_ops.core import checks


def derive_documents(
    shape: tuple[int, int],
    device: torch.device,
    *,
    document_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor | None:
    """Document ids [B, T] (int64) from whatever the batch carries; None if it carries nothing.

    * attention_mask m: document m - 1, so that 0 is padding and numbered documents stay apart;
    * position_ids p: a new document wherever ``p[t] != p[t-1] + 1``;
    * cu_seqlens c: of the B*T tokens in row-major order, those from c[i] to c[i+1] - 1 are document
      i, those after the last entry padding.

    attention_mask and one of the others combine: padding from the mask, boundaries from the other.

    Raises:
        ValueError: two sources that disagree about a boundary or about padding (comparing them
            reads values, so it waits for the device; one source, or a mask with position_ids or
            cu_seqlens, does not).
    """
    padding = None if attention_mask is None else attention_mask == 0
    found: dict[str, Tensor] = {}
    if document_ids is not None:
        found["document_ids"] = document_ids.to(torch.int64)
    if position_ids is not None:
        found["position_ids"] = _from_positions(position_ids.expand(shape))
    if cu_seqlens is not None:
        _check_lengths(cu_seqlens, shape)
        found["cu_seqlens"] = _from_lengths(cu_seqlens.to(device), shape)
    if not found:
        return None if attention_mask is None else attention_mask.to(torch.int64) - 1
    (first, documents), *others = found.items()
    for name, other in others:
        _same_boundaries(first, documents, name, other)
    if padding is None:
        return documents
    if document_ids is not None and not torch.equal(documents < 0, padding):
        raise ValueError(
            "Streams: attention_mask disagrees with document_ids, expected 0 exactly "
            "where ids are < 0"
        )
    return documents.masked_fill(padding, -1)


def _from_positions(positions: Tensor) -> Tensor:
    breaks = positions[:, 1:] != positions[:, :-1] + 1
    first = torch.zeros_like(positions[:, :1], dtype=torch.int64)
    return torch.cat([first, breaks.to(torch.int64)], dim=1).cumsum(dim=1)


def _check_lengths(cu_seqlens: Tensor, shape: tuple[int, int]) -> None:
    """By value only on the CPU: elsewhere a look would wait for the device."""
    tokens = shape[0] * shape[1]
    if not checks.host_reads(cu_seqlens.device) or torch.compiler.is_compiling():
        return
    rising = bool((cu_seqlens[1:] >= cu_seqlens[:-1]).all())
    if (
        cu_seqlens.dim() != 1
        or not rising
        or bool((cu_seqlens < 0).any())
        or bool((cu_seqlens > tokens).any())
    ):
        got = cu_seqlens.tolist() if cu_seqlens.numel() <= 8 else f"{cu_seqlens.numel()} values"
        raise ValueError(
            f"Streams: cu_seqlens is {got}, expected rising offsets within [0, {tokens}]"
        )


def _from_lengths(cu_seqlens: Tensor, shape: tuple[int, int]) -> Tensor:
    token = torch.arange(shape[0] * shape[1], device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return document.masked_fill(document == cu_seqlens.numel() - 1, -1).view(shape)


def _same_boundaries(name: str, documents: Tensor, other_name: str, other: Tensor) -> None:
    def joined(ids: Tensor) -> Tensor:
        return ids[:, 1:] == ids[:, :-1]

    real = (documents >= 0) & (other >= 0)
    compared = real[:, 1:] & real[:, :-1]
    if bool((compared & (joined(documents) != joined(other))).any()):
        raise ValueError(
            f"Streams: {other_name} disagrees with {name}, expected the same document boundaries"
        )
