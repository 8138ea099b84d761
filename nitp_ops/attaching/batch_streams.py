"""The token streams of a Hugging Face batch: what a forward call is given, as `Streams` fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def token_streams(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `Streams` from the keywords of a forward call; other keys are left alone.

    A key whose value is None is absent. input_ids are token_ids; shift_labels come before labels,
    as in the loss of Hugging Face; whose document they belong to is `Streams.label_layout`, which
    no batch says. Documents derive from attention_mask (as wide as the tokens, or with the columns
    of cached keys before) beside cu_seqlens (``cu_seq_lens_q`` or ``cu_seqlens``), or else
    with position_ids. Where a batch carries both it is cu_seqlens that attention obeys; the two
    would have to be compared by value.

    Raises:
        ValueError: an attention_mask that is not ``[B, T]``, from which no padding can be read.
    """
    fields: dict[str, Any] = {"token_ids": batch.get("input_ids")}
    labels = "shift_labels" if batch.get("shift_labels") is not None else "labels"
    fields[labels] = batch.get(labels)
    mask = batch.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        got = (
            f"has shape {tuple(mask.shape)}"
            if isinstance(mask, Tensor)
            else f"is a {type(mask).__name__}"
        )
        raise ValueError(
            f"attach: attention_mask {got}, expected [B, T] (or position_ids, or cu_seqlens)"
        )
    fields["attention_mask"] = None if mask is None else _of_tokens(mask, fields)
    lengths = [
        batch[name] for name in ("cu_seq_lens_q", "cu_seqlens") if batch.get(name) is not None
    ]
    fields |= {"cu_seqlens": lengths[0]} if lengths else {"position_ids": batch.get("position_ids")}
    return {name: value for name, value in fields.items() if value is not None}


def _of_tokens(mask: Tensor, fields: Mapping[str, Any]) -> Tensor:
    """The columns of the tokens, the last ones: keys of a cache, or of PEFT's prefix, come before.
    A float mask, as PEFT's prompts make it, counts by whether it is 0, as in attention."""
    length = next(value.shape[-1] for value in fields.values() if value is not None)
    mask = mask[:, -length:]
    return mask.ceil().long() if mask.is_floating_point() else mask


def with_prompt(fields: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """`fields` as PEFT's prompt tuning hands them on: so many virtual tokens before each row,
    without ids or labels."""
    kept = {
        name: fields[name] for name in ("labels", "attention_mask", "cu_seqlens") if name in fields
    }
    before = {"labels": IGNORE_INDEX, "attention_mask": 1}
    return {
        name: F.pad(kept[name], (tokens, 0), value=before[name]) if name in before else kept[name]
        for name in kept
    }


def label_count(fields: Mapping[str, Any]) -> Tensor:
    """How many labels the batch adds to a Trainer's ``num_items_in_batch``: those that are targets,
    0-d int64."""
    labels = fields["shift_labels"] if "shift_labels" in fields else fields["labels"][..., 1:]
    return (labels != IGNORE_INDEX).sum()


def has_labels(call: Mapping[str, Any]) -> bool:
    return call.get("labels") is not None or call.get("shift_labels") is not None
