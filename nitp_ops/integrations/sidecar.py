"""Own parameters of an objective beside a training checkpoint; the exported model never holds them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from nitp_ops.objectives import CompositeObjective
from nitp_ops.objectives.dtensor import is_dtensor

FILE = "nitp_objective.safetensors"


def save(objective: CompositeObjective, folder: str | os.PathLike[str]) -> Path:
    """Write the own parameters and the spec to ``folder/nitp_objective.safetensors``; the path.

    On several ranks every rank must call: sharded parameters are gathered, rank 0 writes. A crash leaves the old file.

    Raises:
        NotImplementedError: parameters that DeepSpeed ZeRO-3 has partitioned.
    """
    from safetensors.torch import save_file

    path = Path(folder) / FILE
    state = {name: _whole(name, value) for name, value in objective.state_dict().items()}
    if not _distributed() or dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        save_file(state, unfinished, metadata={"format": "pt", "spec": _spec(objective)})
        os.replace(unfinished, path)
    if _distributed():
        dist.barrier()
    return path


@torch.no_grad()
def load(objective: CompositeObjective, folder: str | os.PathLike[str]) -> None:
    """Read the own parameters back; every rank must call.

    Raises:
        FileNotFoundError: no sidecar in the folder.
        ValueError: it belongs to another spec or to a model of other sizes.
        NotImplementedError: parameters that DeepSpeed ZeRO-3 has partitioned.
    """
    from safetensors import safe_open

    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"load: {path} does not exist, expected the sidecar that handle.save(folder) writes")
    with safe_open(path, framework="pt") as file:
        came, expected = (file.metadata() or {}).get("spec", "none"), _spec(objective)
        if came != expected:
            raise ValueError(f"load: {path} has the spec {came}, expected {expected}")
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    own = objective.state_dict()
    shapes = {name: tuple(_checked(name, value).shape) for name, value in own.items()}
    if shapes != (there := {name: tuple(value.shape) for name, value in state.items()}):
        raise ValueError(f"load: {path} holds {there}, expected {shapes}")
    for name, value in own.items():
        value.copy_(_like(value, state[name]))


def _spec(objective: CompositeObjective) -> str:
    return json.dumps(objective.spec.to_dict())


def _checked(name: str, value: Tensor) -> Tensor:
    if hasattr(value, "ds_id"):
        raise NotImplementedError(f"sidecar: {name} is partitioned by DeepSpeed ZeRO-3, expected a whole parameter")
    return value


def _whole(name: str, value: Tensor) -> Tensor:
    if is_dtensor(value):
        value = value.full_tensor()  # type: ignore[attr-defined]
    return _checked(name, value).detach().cpu().contiguous()


def _like(own: Tensor, value: Tensor) -> Tensor:
    if not is_dtensor(own):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)  # type: ignore[attr-defined]


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
