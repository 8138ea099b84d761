"""Losses as modules without parameters.

`ForCausalLMLoss` is what the package `kernels` puts into models (transformers' `use_kernels=True`):
it takes classes with a forward and two flags, without state.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from torch import Tensor, nn

from .ops.cross_entropy.api import linear_cross_entropy
from .ops.cross_entropy.logits.api import cross_entropy

_OPTIONS = tuple(
    name
    for name, each in inspect.signature(linear_cross_entropy).parameters.items()
    if each.kind == each.KEYWORD_ONLY
)


class LinearCrossEntropy(nn.Module):
    """`linear_cross_entropy` as a module, which holds the options and no parameters.

    ``loss(hidden, unembedding, labels, **more) = linear_cross_entropy(hidden, unembedding, labels,
    **options, **more)``

    Args:
        options: any option of `linear_cross_entropy`; one that is given to a call overrides the
            module's.
        hidden: ``[..., d]``, unembedding: ``[V, d]``, labels: ``[...]``, of a call.

    Raises:
        TypeError: no such option; and what `linear_cross_entropy` raises.

    Example:
        >>> import torch, nitp_ops
        >>> loss = nitp_ops.LinearCrossEntropy(softcap=30.0, reduction="sum")
        >>> loss
        LinearCrossEntropy(softcap=30.0, reduction='sum')
        >>> hidden, unembedding = torch.zeros(2, 8), torch.zeros(16, 8)
        >>> labels = torch.tensor([1, 2])
        >>> round(loss(hidden, unembedding, labels, softcap=None).item(), 4)  # 2 ln 16
        5.5452
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name in options:
            if name not in _OPTIONS:
                near = difflib.get_close_matches(name, _OPTIONS, 1)
                hint = f". Did you mean {near[0]}?" if near else ""
                expected = f"expected one of {', '.join(_OPTIONS)}{hint}"
                raise TypeError(f"LinearCrossEntropy: {name} is no option, {expected}")
        self.options = options

    def forward(self, hidden: Tensor, unembedding: Tensor, labels: Tensor, **more: Any) -> Any:
        return linear_cross_entropy(hidden, unembedding, labels, **{**self.options, **more})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class ForCausalLMLoss(nn.Module):
    """The loss of that name of transformers, by `nitp_ops.cross_entropy`: no float32 copy of the
    logits.

    ``sum over t of -log softmax(logits_t)[labels_{t+1}]`` over the labelled positions, divided by
    num_items_in_batch or by their number, in float32 (float64 for float64). A batch without a label
    gives 0 where transformers gives NaN.

    Args:
        logits: ``[..., T, vocab_size]``.
        labels: ``[..., T]`` int64, of the tokens at those positions; not read where shift_labels
            are given.
        vocab_size: the width of logits.
        num_items_in_batch: what the sum is divided by, e.g. the labels of a whole accumulation
            window.
        ignore_index: the label that means "absent".
        shift_labels: ``[..., T]`` int64, already those of the next tokens.
        kwargs: whatever else a model passes on; not read.

    Example:
        >>> import torch, nitp_ops
        >>> loss = nitp_ops.layers.ForCausalLMLoss()
        >>> logits, labels = torch.zeros(1, 3, 16), torch.tensor([[1, 2, 3]])
        >>> round(loss(logits, labels, vocab_size=16).item(), 4)  # ln 16
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
                raise ValueError(
                    "ForCausalLMLoss: labels is None, expected a tensor (or one of shift_labels)"
                )
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        shift_labels = shift_labels.reshape(logits.shape[:-1]).to(logits.device)
        if num_items_in_batch is None:
            return cross_entropy(logits, shift_labels, ignore_index=ignore_index)
        loss = cross_entropy(logits, shift_labels, ignore_index=ignore_index, reduction="sum")
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch
