"""The projector P of a latent objective: training only, raw parameters, read only where it is
`opened`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from nitp_ops.engine.streams.model_info import ModelInfo

from .parameters import OwnParameters

Kind: TypeAlias = Literal["swiglu", "linear", "none"]
Matrices: TypeAlias = tuple[Tensor | None, Tensor | None]


class Projector(OwnParameters):
    """``P(h) = W_down (silu(W_gate h) * W_up h)`` (swiglu), ``W_down h`` (linear) or ``h`` (none);
    no bias, no norm.

    The gate and the up matrix are the halves of one parameter ``gate_up [2m, d]``, which the op
    takes as it is; ``down`` is ``[d, m]`` (linear: ``[d, d]``).

    Args:
        kind: of the projector. intermediate_size: m. seed: of the initial values.

    Raises:
        ValueError: at the first call, when ``down`` is all zero: every prediction is then 0, where
            the loss has no gradient, so the term would never learn.
    """

    gate_up: nn.Parameter | None
    down: nn.Parameter | None

    def __init__(self, kind: Kind, info: ModelInfo, intermediate_size: int, seed: int) -> None:
        width, inner = info.hidden_size, intermediate_size if kind == "swiglu" else info.hidden_size
        gate_up = (2 * inner, width) if kind == "swiglu" else None
        super().__init__(
            info, seed, gate_up=gate_up, down=None if kind == "none" else (width, inner)
        )
        self.kind = kind
        self._down_checked = kind == "none"

    def matrices(self, mask: Callable[[Tensor], Tensor]) -> Matrices:
        """(gate_up, down) through `Context.mask_zero_weight`; only where they may be read, see
        `opened`."""
        gate_up = None if self.gate_up is None else mask(self.gate_up)
        down = None if self.down is None else mask(self.down)
        # is_compiling comes first, so that a compiled graph does not depend on the flag
        if not torch.compiler.is_compiling() and not self._down_checked and down is not None:
            if not bool(down.any()):
                raise ValueError(
                    "Projector: down is all zero, expected initial values (call reset_parameters)"
                )
            self._down_checked = True
        return gate_up, down

    def training_flops(self, width: int) -> int:
        """FLOPs per token, forward and backward: 6 a parameter of the GEMMs (18 m d for swiglu) + 18
        d elementwise."""
        return 6 * sum(parameter.numel() for parameter in self.parameters()) + 18 * width

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}"
