"""A mixed precision policy of FSDP2 casts parameters and hidden states, never a weight, a count or
a loss of ours."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import nitp_ops
from nitp_ops.objectives import CompositeObjective, Counts, Streams, build
from tests.distributed.engines.fsdp_groups_cases import EVERY_READER, tiny_llama
from tests.support.objectives_cases import INFO, Batch, make_batch

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
]
#: What Accelerate makes of mixed_precision="bf16"
POLICY = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)
EVERY_FLOAT = (
    "ntp(class_weight=true) + balance: 0.01*external + 0.3*fsp_bow + 0.2*mtp_parallel(offsets=[4])"
)
EVERY_FLOAT += EVERY_READER.removeprefix("ntp")


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[reportPrivateImportUsage]
    yield
    dist.destroy_process_group()


def narrow(module: nn.Module) -> nn.Module:
    """The same without FSDP2: parameters in bfloat16, buffers as they were."""
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16()
    return module


def close(mine: Tensor | None, expected: Tensor | None, what: str) -> None:
    assert mine is not None and expected is not None, what
    mine = mine.full_tensor() if isinstance(mine, DTensor) else mine
    # FSDP2 hands out the gradient of a parameter in its own dtype
    torch.testing.assert_close(
        mine.to(expected.dtype), expected, rtol=1e-6, atol=1e-6, msg=lambda text: f"{what}: {text}"
    )


def llama_groups(model: Any) -> None:
    mesh = init_device_mesh("cpu", (1,))
    for owner in (*model.model.layers, model.model.embed_tokens, model.lm_head, model):
        fully_shard(owner, mesh=mesh, mp_policy=POLICY)


@pytest.mark.parametrize("return_dict", [True, False])
def test_the_loss_of_an_attached_model_stays_float32(return_dict: bool):
    model = tiny_llama(dtype=torch.float32)
    handle = nitp_ops.attach(model, EVERY_READER)
    other: Any = narrow(model)
    ids = torch.randint(3, 61, (3, 301), generator=torch.Generator().manual_seed(1))
    expected = other(input_ids=ids, labels=ids).loss
    expected.backward()
    llama_groups(model)
    out = model(input_ids=ids, labels=ids, return_dict=return_dict)
    loss = out.loss if return_dict else out[0]
    assert loss.dtype == torch.float32
    close(loss, expected, "loss")
    assert handle.metrics is not None
    measured = other.nitp_handle.metrics.compute()
    for name, value in handle.metrics.compute().items():
        assert value == pytest.approx(measured[name], rel=1e-6, abs=1e-6, nan_ok=True), name
    loss.backward()
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        close(mine.grad, theirs.grad, name)


def offered(batch: Batch) -> tuple[Streams, Tensor]:
    external = torch.tensor(1.2345678, requires_grad=True)
    weights = {
        "token_weight": torch.full(batch.ids.shape, 0.1),
        "class_weight": torch.linspace(0.1, 1.7, INFO.vocab_size),
    }
    states = {k: state.detach().float().requires_grad_() for k, state in batch.states.items()}
    hidden = batch.hidden.detach().float().requires_grad_()
    head, embed = batch.head.float(), batch.embed.float()
    return batch.streams(
        last_hidden=hidden,
        hidden_states=states,
        head=head,
        embed=embed,
        external={"balance": external},
        **weights,
    ), external


@pytest.mark.parametrize("terms", [True, False], ids=["each term a group", "one group"])
def test_what_an_objective_reads_and_returns_keeps_its_dtype(terms: bool):
    batch, info = make_batch(), INFO
    objective = build(EVERY_FLOAT, model=info).float()
    other, found = narrow(objective), []
    counts = Counts({name: 3 * count for name, count in objective.count(offered(batch)[0]).items()})
    for each in (other, objective):
        if each is objective:
            for owner in (*(objective.terms.values() if terms else ()), objective):
                fully_shard(owner, mesh=init_device_mesh("cpu", (1,)), mp_policy=POLICY)
        batch.head.zero_grad()  # to None: the gradients before stay as they are
        batch.embed.zero_grad()
        streams, external = offered(batch)
        assert isinstance(each, CompositeObjective)
        out = each(streams, counts=counts)
        assert out.loss.dtype == torch.float32
        out.loss.backward()
        assert streams.last_hidden is not None
        gradients = {
            "external": external.grad,
            "hidden": streams.last_hidden.grad,
            "loss": out.loss.detach(),
        }
        owners = {"head": batch.head, "embed": batch.embed, "objective": each}
        gradients |= {
            f"{o}.{n}": p.grad for o, owner in owners.items() for n, p in owner.named_parameters()
        }
        found.append((gradients, out.metrics.compute()))
    (expected, measured), (mine, metrics) = found
    for name, value in expected.items():
        close(mine[name], value, name)
    for name, value in measured.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6, abs=1e-6, nan_ok=True), name
