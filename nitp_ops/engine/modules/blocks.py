"""Transformer blocks that an objective owns: the model's, or a plain one, and what their attention
may look at."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nitp_ops.engine.streams.model_info import ModelInfo
from nitp_ops.engine.streams.streams import Streams

from .parameters import Matrix

_EPS = 1e-6


class RMSNorm(nn.Module):
    """``x / sqrt(mean x^2 + 1e-6) * weight``, ones at first."""

    def __init__(self, info: ModelInfo) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(info.hidden_size, dtype=info.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, _EPS)


class KeyValues:
    """Keys and values of the positions that attention has read, ``[B, heads, T, head_size]``: a
    cache for decoding."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        """T."""
        return 0 if self.keys is None else self.keys.shape[2]

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, *, enable_gqa: bool = False
    ) -> Tensor:
        """Causal attention of the next n positions over all earlier ones and themselves; they
        are kept.

        query, keys, values: ``[B, heads, n, head_size]``, with ``enable_gqa`` fewer heads of keys
            and values.
        """
        if self.keys is not None and self.values is not None:
            keys, values = (
                torch.cat([self.keys, keys], dim=2),
                torch.cat([self.values, values], dim=2),
            )
        self.keys, self.values = keys, values
        if query.shape[2] == self.length:
            return F.scaled_dot_product_attention(
                query, keys, values, is_causal=True, enable_gqa=enable_gqa
            )
        position = torch.arange(self.length, device=query.device)
        mask = position[-query.shape[2] :].unsqueeze(-1) >= position
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, enable_gqa=enable_gqa
        )

    def cut(self, length: int) -> None:
        """Forget everything after the first ``length`` positions."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]


class Block(nn.Module):
    """``x <- x + Attention(RMSNorm(x)); x <- x + W_down (silu(W_gate u) * W_up u), u =
    RMSNorm(x)``.

    Causal attention with heads of size gcd(d, 64), no bias and no positions of its own: the hidden
    states that it reads carry them. The inner size is 8 d / 3, rounded up to a multiple of 64:
    about 12 d^2 parameters. Matrices start as normal(0, initializer_range).
    """

    incremental = True

    def __init__(self, info: ModelInfo) -> None:
        super().__init__()
        width = info.hidden_size
        inner = 64 * math.ceil(8 * width / (3 * 64))
        self.head_size = math.gcd(width, 64)
        self.attention_norm, self.mlp_norm = RMSNorm(info), RMSNorm(info)
        self.query_key_value, self.output = (
            Matrix(3 * width, width, info),
            Matrix(width, width, info),
        )
        self.gate_up, self.down = Matrix(2 * inner, width, info), Matrix(width, inner, info)

    def forward(self, hidden: Tensor, mask: Tensor | None, past: KeyValues | None = None) -> Tensor:
        """[B, T, d] to [B, T, d]; mask: bool [B, 1, T, T], True where a position may look, None:
        causal alone.

        With ``past`` the T positions follow those that it holds, and there is no mask.
        """
        heads = self.query_key_value(self.attention_norm(hidden)).unflatten(
            -1, (3, -1, self.head_size)
        )
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        if past is None:
            seen = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None
            )
        else:
            seen = past.attend(query, key, value)
        hidden = hidden + self.output(seen.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, dim=-1)
        return hidden + self.down(F.silu(gate) * up)


def factory_problems(info: ModelInfo) -> list[str]:
    """What is wrong with the model's factory, one line at most: it makes a block, which reads two
    positions.

    What else the block raises is left to its first step: it may need a device that it is moved to
    later.
    """
    if info.block_factory is None:
        return []
    if not callable(info.block_factory):
        return [f"block_factory is {info.block_factory!r}, expected a function that makes a block"]
    expected = (1, 2, info.hidden_size)
    with torch.random.fork_rng(devices=()), torch.no_grad():
        try:
            block = info.block_factory()
        except Exception as error:
            return [f"block_factory raised {type(error).__name__}: {error}"]
        if not isinstance(block, nn.Module):
            return [f"block_factory returned a {type(block).__name__}, expected an nn.Module"]
        like = next(block.parameters(), torch.zeros((), dtype=info.dtype))
        try:
            found = block(torch.zeros(expected, dtype=like.dtype, device=like.device), None)
        except TypeError as error:
            return [
                f"block_factory made a block that can not be called as block(hidden, mask): {error}"
            ]
        except Exception:
            return []
    if not isinstance(found, Tensor):
        return [
            f"block_factory made a block that returns a {type(found).__name__}, expected a "
            "tensor [B, T, d]"
        ]
    if tuple(found.shape) != expected:
        return [
            f"block_factory made a block that turns {expected} into {tuple(found.shape)}, "
            f"expected {expected}"
        ]
    return []


def make_block(info: ModelInfo) -> nn.Module:
    """A block of the model's factory, or a plain one; its parameters in the model's dtype."""
    block = Block(info) if info.block_factory is None else info.block_factory()
    for parameter in block.parameters():  # buffers, such as rotary frequencies, keep their dtype
        parameter.data = parameter.data.to(info.dtype)
    return block


def attention_mask(streams: Streams) -> Tensor | None:
    """bool [B, 1, T, T]: s <= t and doc[s] == doc[t] (padding looks at padding, so no row is
    empty); None: causal.

    Under context parallel [B, 1, T/p, T]: the rows that are here, against the whole sequence.
    """
    documents = streams.documents
    if documents is None:
        return None
    position = torch.arange(documents.shape[1], device=streams.device)
    same = streams.here(documents).unsqueeze(-1) == documents.unsqueeze(-2)
    return (same & (streams.here(position.unsqueeze(0)).unsqueeze(-1) >= position)).unsqueeze(1)


def whole_sequence_problems(module: nn.Module | None) -> list[str]:
    """One line if a term's blocks, the children of a ModuleList or their ``block``, need the whole
    sequence."""
    lists = (
        []
        if module is None
        else [each for each in module.children() if isinstance(each, nn.ModuleList)]
    )
    blocks = [getattr(each, "block", each) for layers in lists for each in layers]
    whole = sorted(
        {type(block).__name__ for block in blocks if not getattr(block, "context_parallel", False)}
    )
    if not whole:
        return []
    expected = "expected a block_factory whose blocks have context_parallel = True (see ModelInfo)"
    return [f"its blocks ({', '.join(whole)}) attend over the whole sequence, {expected}"]


def without_padding(hidden: Tensor, streams: Streams) -> Tensor:
    """Zeros where there is no document: attention multiplies what it may not see by zero, and a NaN
    would stay one."""
    if streams.documents is None:
        return hidden
    return hidden.masked_fill((streams.here(streams.documents) < 0).unsqueeze(-1), 0)
