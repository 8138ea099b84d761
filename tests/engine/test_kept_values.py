"""Own parameters and buffers that move to the meta device and come back have their values, or those
of the seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nitp_ops.objectives import CompositeObjective, ModelInfo, build

SPEC = "ntp + nitp(target_layer=1) + mtp_parallel(offsets=[3]) + 0.3*mtp_sequential + top(window=4)"


class Rotary(nn.Module):
    """A block with buffers, as rotary embeddings have: one is in its state dict, one is not."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8))
        self.register_buffer("kept", torch.randn(8))
        self.register_buffer("frequencies", 1 / torch.arange(1.0, 9.0), persistent=False)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        return hidden * self.scale * self.kept * self.frequencies  # type: ignore[operator]


def built(factory: Callable[[], nn.Module] | None) -> CompositeObjective:
    return build(
        SPEC, model=ModelInfo(hidden_size=8, vocab_size=16, num_layers=4, block_factory=factory)
    )


def values(objective: nn.Module) -> dict[str, Tensor]:
    return {
        name: x.detach().clone()
        for name, x in (*objective.named_parameters(), *objective.named_buffers())
    }


def equal(objective: nn.Module, expected: dict[str, Tensor]) -> bool:
    found = values(objective)
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], x) for name, x in expected.items()
    )


@pytest.fixture(params=[None, Rotary], ids=["plain block", "block with buffers"])
def factory(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_what_was_built_on_the_meta_device_gets_the_values_of_the_seed_wherever_it_goes(
    factory: Any,
):
    plain = values(built(factory))
    with torch.device("meta"):
        late = built(factory)
    assert equal(late.to_empty(device="cpu"), plain)


def test_what_was_trained_comes_back_as_it_was(factory: Any):
    objective, seeded = built(factory), values(built(factory))
    with torch.no_grad():
        for tensor in (*objective.parameters(), *objective.buffers()):
            tensor.add_(1)
    trained = values(objective)
    assert equal(objective.to("meta").to_empty(device="cpu"), trained)
    assert equal(nn.ModuleList([objective]).to("meta").to_empty(device="cpu")[0], trained)
    objective.to("meta").double()
    objective.materialize(torch.device("cpu"))
    assert equal(objective, {name: tensor.double() for name, tensor in trained.items()})
    objective.to("meta").reset_parameters()
    assert equal(objective.float().to_empty(device="cpu"), seeded)


def test_a_term_that_went_alone_is_drawn_and_the_others_stay():
    objective, seeded = built(None), values(built(None))
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(1)
    expected = {
        name: seeded[name] if "nitp" in name else x for name, x in values(objective).items()
    }
    objective.terms["nitp"].to("meta")
    objective.materialize(torch.device("cpu"))
    assert equal(objective, expected)
