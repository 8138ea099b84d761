"""The parameters that a term brings along: raw tensors with initial values that depend on the seed alone."""

from __future__ import annotations

import torch
from torch import nn

from .model_info import ModelInfo


class OwnParameters(nn.Module):
    """Parameters of the given shapes (None: registered as absent), drawn from normal(0, initializer_range).

    They are raw, so that quantisers and adapters leave them alone. They are drawn in order, on the CPU, by an own
    generator: the values depend on the seed alone, not on the device, not on the global generator.
    """

    def __init__(self, info: ModelInfo, seed: int, **shapes: tuple[int, ...] | None) -> None:
        super().__init__()
        self.seed, self.initializer_range = seed, info.initializer_range
        for name, shape in shapes.items():
            empty = None if shape is None else nn.Parameter(torch.empty(shape, dtype=info.dtype))
            self.register_parameter(name, empty)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial values anew, always the same ones; on the meta device nothing happens."""
        generator = torch.Generator().manual_seed(self.seed)
        for parameter in self.parameters(recurse=False):
            if not parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                parameter.copy_(values.normal_(0.0, self.initializer_range, generator=generator))


class OwnHead(OwnParameters):
    """An unembedding ``weight [V, d]`` beside the model's, without a bias; `through_head` reads it."""

    weight: nn.Parameter

    def __init__(self, info: ModelInfo, seed: int) -> None:
        super().__init__(info, seed, weight=(info.vocab_size, info.hidden_size))
