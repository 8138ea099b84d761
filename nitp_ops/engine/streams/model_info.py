"""What the objectives need to know about a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from nitp_ops.engine.spec.validation import is_int, of_64_bits, shown, type_problem


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """Sizes of a model and what its head does to the logits: ``z = softcap * tanh(logit_scale * (W
    h + b) / softcap)``.

    Args:
        hidden_size: d.
        vocab_size: V, the rows of the unembedding.
        num_layers: L, the number of blocks.
        softcap: cap of the model's logits, or None; every head inherits it.
        logit_scale: factor on the model's logits, before the softcap.
        dtype: dtype of parameters that objectives bring along.
        initializer_range: standard deviation of their initial values, > 0.
        block_factory: makes one transformer block of the model, for objectives that own blocks. The
            block is called as ``block(hidden [B, T, d], mask)`` and returns ``[B, T, d]``; mask is
            a bool ``[B, 1, T, T]``, True where position t (row) may look at s (column): s <= t,
            same document; None: one document a row, causal alone. It keeps the initial values that
            the factory gives it. With an attribute ``incremental = True`` it is called as
            ``block(hidden, None, past)`` in `CompositeObjective.draft`, past a `KeyValues`;
            without, it reads the whole sequence at each call there. With an attribute
            ``context_parallel = True`` it is called with a part of the sequence too, ``hidden [B,
            T/p, d]`` and mask ``[B, 1, T/p, T]``, and finds the other keys and values by itself.
            None: a plain block, which has the first and not the second, see `blocks`.
        sequence_length: most tokens of a training sequence (with the one that only shift_labels
            knows): `build` then refuses an offset that reaches past it. None: unknown.

    Raises:
        TypeError, ValueError: a value of the wrong type or outside its range.

    Example:
        >>> ModelInfo(hidden_size=64, vocab_size=256, num_layers=17).num_layers
        17
    """

    hidden_size: int
    vocab_size: int
    num_layers: int
    softcap: float | None = None
    logit_scale: float = 1.0
    dtype: torch.dtype = torch.float32
    initializer_range: float = 0.02
    block_factory: Callable[[], nn.Module] | None = None
    sequence_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("hidden_size", "vocab_size", "num_layers", "sequence_length"):
            value = getattr(self, name)
            if name == "sequence_length" and value is None:
                continue
            if not is_int(value):
                raise TypeError(
                    f"ModelInfo: {name} is {shown(value)}, expected an integer{of_64_bits(value)}"
                )
            if value < 1:
                raise ValueError(f"ModelInfo: {name} is {value}, expected an integer >= 1")
        for name in ("softcap", "logit_scale", "initializer_range"):
            value = getattr(self, name)
            if name == "softcap" and value is None:
                continue
            if problem := type_problem(name, value, float):
                raise TypeError(f"ModelInfo: {problem}")
            if value <= 0:
                zero = (
                    " (a zero last matrix gets no gradient)" if name == "initializer_range" else ""
                )
                raise ValueError(f"ModelInfo: {name} is {value}, expected a number > 0{zero}")
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise TypeError(f"ModelInfo: dtype is {self.dtype!r}, expected a floating point dtype")
