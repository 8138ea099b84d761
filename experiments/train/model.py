"""A Llama-style decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from nitp_ops.objectives import KeyValues


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shapes of the decoder; `kv_heads` < `heads` is grouped-query attention."""

    vocab_size: int = 256
    dim: int = 128
    layers: int = 5
    heads: int = 4
    kv_heads: int = 4
    context: int = 128
    tied: bool = False
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers", "heads", "kv_heads", "context"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"ModelConfig: {name} is {getattr(self, name)}, expected at least 1"
                )
        if self.dim % (2 * self.heads):
            raise ValueError(
                f"ModelConfig: dim is {self.dim}, expected a multiple of 2 x heads = "
                f"{2 * self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"ModelConfig: kv_heads is {self.kv_heads}, expected a divisor of heads = "
                f"{self.heads}"
            )

    @property
    def intermediate_size(self) -> int:
        """8/3 dim, rounded up to a multiple of 32: a SwiGLU as large as a 4 dim MLP."""
        return 32 * math.ceil(self.dim * 8 / 3 / 32)


@dataclass
class Hidden:
    """What a forward pass exposes, all [B, T, dim]."""

    last_hidden: torch.Tensor
    """After the final norm: what the unembedding sees."""
    last_residual: torch.Tensor
    """The same before the final norm."""
    hidden_states: dict[int, torch.Tensor] = field(default_factory=dict)
    """The residual stream after k blocks, for the k asked for; 0 is the embedding output."""


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``, in the dtype of the weight whatever autocast says."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.to(self.weight.dtype), (x.shape[-1],), self.weight, self.eps).to(
            x.dtype
        )


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_dim = config.dim // config.heads
        self.q_proj = nn.Linear(config.dim, config.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * self.head_dim, config.dim, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        past: KeyValues | None = None,
    ) -> torch.Tensor:
        batch, time, _ = x.shape
        q = self.q_proj(x).view(batch, time, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, time, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, time, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        grouped = self.kv_heads != self.heads
        if past is None:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            mixed = past.attend(q, k, v, enable_gqa=grouped)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, time, -1))


class MLP(nn.Module):
    """``down(silu(gate x) * up x)``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.dim, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        past: KeyValues | None = None,
    ) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, past)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Tokens in, hidden states out; the head is a module of its own so that a loss can fuse it.

    Args:
        config: shapes.
        seed: seed of the initial weights, drawn with a generator of its own: two decoders of one
            seed are equal whatever else was drawn before them.
    """

    cosine: torch.Tensor
    sine: torch.Tensor

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed.weight
        cosine, sine = rotary_table(config.context, config.dim // config.heads, config.rope_base)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Matrices from N(0, initializer_range), those that write to the residual stream / sqrt(2
        layers)."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0)
                continue
            std = self.config.initializer_range
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * self.config.layers)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def forward(
        self,
        token_ids: torch.Tensor,
        keep: Collection[int] = (),
        past: Sequence[KeyValues] | None = None,
    ) -> Hidden:
        """Hidden states of token_ids[B, T]; `keep` names the numbers of blocks whose output is
        returned.

        With `past`, one a block, the tokens follow those that it holds, and it then holds them too.
        """
        start = past[0].length if past else 0
        stop = start + token_ids.shape[-1]
        if stop > self.config.context:
            raise ValueError(
                f"Decoder: {stop} tokens came, expected at most context = {self.config.context}"
            )
        rotation = self.cosine[start:stop], self.sine[start:stop]
        x = self.embed(token_ids)
        kept = {0: x} if 0 in keep else {}
        for index, block in enumerate(self.blocks, start=1):
            x = block(x, rotation, past[index - 1] if past else None)
            if index in keep:
                kept[index] = x
        return Hidden(last_hidden=self.norm(x), last_residual=x, hidden_states=kept)

    @torch.no_grad()
    def sample(
        self, prompt: torch.Tensor, length: int, temperature: float, seed: int
    ) -> torch.Tensor:
        """`length` tokens that continue prompt[T], each from softmax(logits / temperature); no
        cache."""
        generator = torch.Generator().manual_seed(seed)
        tokens = prompt.clone()
        for _ in range(length):
            hidden = self(tokens[None, -self.config.context :]).last_hidden[0, -1]
            weights = torch.softmax(self.lm_head(hidden).float().cpu() / temperature, dim=-1)
            tokens = torch.cat(
                [tokens, torch.multinomial(weights, 1, generator=generator).to(tokens.device)]
            )
        return tokens[prompt.shape[0] :]


def rotary_table(context: int, head_dim: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of ``t / base^(2i / head_dim)``, each [context, head_dim / 2], float32."""
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(context, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x_i, x_{i + head_dim / 2}) of x[B, H, T, head_dim] by the angles of their
    position."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return turned.to(x.dtype)
