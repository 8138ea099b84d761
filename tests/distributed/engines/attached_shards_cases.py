"""Attached models under FSDP2 on two ranks: sharded on the meta device by Accelerate, and with a
pass too early."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import nitp_ops
from tests.support.hugging_face_cases import batch, make

SPEC = "ntp + 0.8*nitp(target_layer=1) + 0.3*mtp_sequential"
RATE, STEPS = 0.1, 3


def losses(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    """Of a few steps with the same rows on every rank."""
    found = []
    for _ in range(STEPS):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def expected_losses(model: Any) -> list[float]:
    """Of the same steps in one process."""
    alone = copy.deepcopy(model)
    return losses(alone, torch.optim.SGD(alone.parameters(), lr=RATE))


def sharded(model: Any) -> Any:
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def prepared_by_accelerate(model: Any) -> Any:
    """What ``Accelerator.prepare`` does to a model; an Accelerator itself has no FSDP on the CPU."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=True, auto_wrap_policy="transformer_based_wrap"
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
        parallelism_config=None,
    )
    return fsdp2_prepare_model(accelerator, model)  # type: ignore[reportArgumentType]


def ram_efficient_loading(tied: bool, trained: bool) -> None:
    """accelerate#3898: only what is in the state dict is broadcast."""
    model = make("llama", tie_word_embeddings=tied)
    handle = nitp_ops.attach(model, SPEC)
    if trained:
        with torch.no_grad():
            for parameter in handle.objective.parameters():
                parameter.mul_(1.5)
    before = {
        name: parameter.detach().clone() for name, parameter in handle.objective.named_parameters()
    }
    expected = expected_losses(model)
    if dist.get_rank():  # there only rank 0 reads the checkpoint
        with torch.no_grad():
            for parameter in model.model.parameters():
                parameter.zero_()
    model = prepared_by_accelerate(model)
    for name, value in before.items():
        own = handle.objective.get_parameter(name)
        assert isinstance(own, DTensor) and torch.equal(own.full_tensor(), value), name
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    handle.check(optimizer)
    assert losses(model, optimizer) == pytest.approx(expected, rel=1e-6)


def a_pass_before_the_optimizer() -> None:
    """pytorch#149205: fully_shard leaves gathered tensors in ``parameters()``, which never train."""
    model = make("llama")
    handle = nitp_ops.attach(model, SPEC)
    expected = expected_losses(model)
    sharded(model)
    model.eval()(**batch())
    model.train()
    early = torch.optim.SGD(model.parameters(), lr=RATE)
    match = r"^check: the optimizer holds gathered copies of sharded parameters \(.*embed_tokens\.weight.* more\), exp"
    with pytest.raises(ValueError, match=match):
        handle.check(early)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)  # check has resharded
    handle.check(optimizer)
    assert losses(model, optimizer) == pytest.approx(expected, rel=1e-9)
    # also once they are no parameters of the model
    with pytest.raises(ValueError, match="gathered copies"):
        handle.check(early)


def only_parameters_of_the_model_are_copies() -> None:
    model = make("llama")
    handle = nitp_ops.attach(model, "ntp")
    sharded(model)
    model.eval()(**batch())
    early = torch.optim.SGD([model.lm_head.weight], lr=RATE)
    with pytest.raises(
        ValueError,
        match=r"gathered copies of sharded parameters "
        r"\(lm_head\.weight\), expected",
    ):
        handle.check(early)


def attach_to_a_sharded_model(passes: int) -> None:
    model = sharded(make("llama"))
    for _ in range(passes):
        model.eval()(**batch())
    with pytest.raises(
        ValueError,
        match=r"model is sharded \(FSDP\w+\), expected attach before "
        r"fully_shard",
    ):
        nitp_ops.attach(model, SPEC)


def to_empty(before: Callable[[Any], Any], after: Callable[[Any], Any], untied: bool) -> None:
    """verl#7834: a tied head on the meta device, emptied before or after it is sharded."""
    expected = expected_losses(attached(make("llama", tie_word_embeddings=True)))
    plain = make("llama", tie_word_embeddings=True)
    model = copy.deepcopy(plain).to("meta")
    model.tie_weights()
    before(attached(model)).to_empty(device="cpu")
    model.model.rotary_emb = copy.deepcopy(plain.model.rotary_emb)
    with torch.no_grad():
        for name, value in plain.state_dict().items():
            mine = model.get_parameter(name)
            if isinstance(mine, DTensor):
                value = DTensor.from_local(value, mine.device_mesh).redistribute(
                    placements=mine.placements
                )
            mine.copy_(value)
    after(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    if untied:
        with pytest.raises(ValueError, match="were one parameter at attach and are two"):
            losses(model, optimizer)
    else:
        assert losses(model, optimizer) == pytest.approx(expected, rel=1e-6)


def attached(model: Any) -> Any:
    nitp_ops.attach(model, SPEC)
    return model


def same(model: Any) -> Any:
    return model


def tied_again(model: Any) -> Any:
    model.tie_weights()
    return sharded(model)


CASES: dict[str, Callable[[], None]] = {
    "ram efficient loading, tied": partial(ram_efficient_loading, True, False),
    "ram efficient loading, untied": partial(ram_efficient_loading, False, False),
    "ram efficient loading, trained before": partial(ram_efficient_loading, True, True),
    "a pass before the optimizer": a_pass_before_the_optimizer,
    "a pass before an optimizer of the head": only_parameters_of_the_model_are_copies,
    "attach to a sharded model": partial(attach_to_a_sharded_model, 0),
    "attach to a sharded model after a pass": partial(attach_to_a_sharded_model, 1),
    "to_empty before fully_shard": partial(to_empty, same, sharded, True),
    "to_empty, tied again, fully_shard": partial(to_empty, same, tied_again, False),
    "fully_shard before to_empty": partial(to_empty, sharded, same, False),
}
