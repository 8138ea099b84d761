"""Layers that the package `kernels` puts into models (transformers' `use_kernels=True`).

It takes classes with a forward and two flags, without state.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._cross_entropy import cross_entropy


class ForCausalLMLoss(nn.Module):
    """The loss of that name of transformers, by `nitp_ops.cross_entropy`: no float32 copy of the logits.

    ``sum over t of -log softmax(logits_t)[labels_{t+1}]`` over the labelled positions, divided by num_items_in_batch or
    by their number, in float32 (float64 for float64). A batch without a label gives 0 where transformers gives NaN.

    Args:
        logits: ``[..., T, vocab_size]``.
        labels: ``[..., T]`` int64, of the tokens at those positions; not read where shift_labels are given.
        vocab_size: the width of logits.
        num_items_in_batch: what the sum is divided by, e.g. the labels of a whole accumulation window.
        ignore_index: the label that means "absent".
        shift_labels: ``[..., T]`` int64, already those of the next tokens.
        kwargs: whatever else a model passes on; not read.

    Example:
        >>> import torch, nitp_ops
        >>> loss = nitp_ops.layers.ForCausalLMLoss()
        >>> round(loss(torch.zeros(1, 3, 16), torch.tensor([[1, 2, 3]]), vocab_size=16).item(), 4)  # ln 16
        2.7726
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        logits = logits.view(*logits.shape[:-1], vocab_size)
        if shift_labels is None:
            if labels is None:
                raise ValueError("ForCausalLMLoss: labels is None, expected a tensor (or one of shift_labels)")
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        shift_labels = shift_labels.reshape(logits.shape[:-1]).to(logits.device)
        if num_items_in_batch is None:
            return cross_entropy(logits, shift_labels, ignore_index=ignore_index)
        loss = cross_entropy(logits, shift_labels, ignore_index=ignore_index, reduction="sum")
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch
