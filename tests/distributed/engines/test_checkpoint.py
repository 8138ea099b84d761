"""A distributed checkpoint of four processes is read by two: weights and optimizer state, the
objective's included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.support.engine_cases import SPECS, Model, packed_batch, same, start

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
]
SPEC = SPECS["all at once"]


def sharded(ranks: int) -> tuple[Model, torch.optim.Optimizer]:
    model = Model(SPEC, packed_batch())
    mesh = init_device_mesh("cpu", (ranks,))
    for owner in (model.head, *model.objective.terms.values(), model):
        fully_shard(owner, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: Model, optimizer: torch.optim.Optimizer, rank: int, ranks: int) -> None:
    rows = 4 // ranks
    part = packed_batch().part(slice(rows * rank, rows * rank + rows))
    model(part, counts=model.count(part).all_reduce()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def everything(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All weights and moments, whole."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in {"weight": parameter, **optimizer.state[parameter]}.items():
            found[f"{name}: {key}"] = (
                (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
            )
    return found


def save(rank: int, folder: str) -> None:
    model, optimizer = sharded(4)
    train(model, optimizer, rank, 4)
    weights, state = get_state_dict(model, optimizer)
    save_checkpoint({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/checkpoint")
    saved = everything(model, optimizer)
    train(model, optimizer, rank, 4)
    following = everything(model, optimizer)
    if rank == 0:
        torch.save([saved, following], f"{folder}/expected.pt")


def load(rank: int, folder: str) -> None:
    model, optimizer = sharded(2)
    weights, state = get_state_dict(model, optimizer)
    load_checkpoint({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/checkpoint")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    saved, following = torch.load(f"{folder}/expected.pt", weights_only=True)
    mine = everything(model, optimizer)
    assert mine.keys() == saved.keys() and any(
        "objective.terms.nitp.down: exp_avg" in name for name in mine
    )
    for name, value in mine.items():
        assert torch.equal(value, saved[name]), name
    train(model, optimizer, rank, 2)
    for name, value in everything(model, optimizer).items():
        same(value, following[name], f"{name} a step later", 1e-9)  # AdamW divides by small moments


def test_two_ranks_go_on_where_four_stopped(tmp_path: Path):
    start(save, 4, tmp_path, str(tmp_path))
    start(load, 2, tmp_path, str(tmp_path))
