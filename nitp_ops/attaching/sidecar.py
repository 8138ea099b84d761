"""Own parameters of an objective beside a training checkpoint; the exported model never holds them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from nitp_ops.core.checks import is_dtensor
from nitp_ops.core.files import checksum, write_whole
from nitp_ops.engine.streams.collectives import agree, is_distributed
from nitp_ops.objectives import CompositeObjective

FILE = "nitp_objective.safetensors"


def save(objective: CompositeObjective, folder: str | os.PathLike[str]) -> Path:
    """Write the own parameters and the spec to ``folder/nitp_objective.safetensors``; the path.

    On several ranks every rank must call: sharded parameters are gathered, rank 0 writes. A crash
    leaves the old file.

    Raises:
        ValueError: parameters on the meta device.
        NotImplementedError: parameters that DeepSpeed ZeRO-3 has partitioned.
        OSError: the file cannot be written. On the ranks that all is well with: RuntimeError with
            the same reason.
    """
    from safetensors.torch import save as serialized

    path, spec, own, failure = Path(folder) / FILE, _spec(objective), _own(objective), None
    try:
        for name, value in own.items():
            _checked("save", name, value)
    except Exception as error:
        failure = error
    # before the parameters are gathered, which would wait for a rank that has raised
    agree("save", failure)
    state = {name: _whole(value) for name, value in own.items()}
    if not is_distributed() or dist.get_rank() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"format": "pt", "spec": spec, "sha256": checksum(state, spec)}
            write_whole(path, serialized(state, metadata=metadata))
        except Exception as error:
            failure = error
    agree("save", failure)
    return path


@torch.no_grad()
def load(objective: CompositeObjective, folder: str | os.PathLike[str]) -> None:
    """Read the own parameters back; every rank must call. Nothing is changed where anything is
    wrong, on any rank.

    Raises:
        FileNotFoundError: no sidecar in the folder.
        ValueError: it is damaged, belongs to another spec or to a model of other sizes; parameters
            on the meta device. On the other ranks, and where ranks read different files:
            RuntimeError with the reason.
        NotImplementedError: parameters that DeepSpeed ZeRO-3 has partitioned.
    """
    state, found, failure = {}, "", None
    try:
        state, found = _read(objective, Path(folder) / FILE)
    except Exception as error:
        failure = error
    agree("load", failure, found)
    for name, value in objective.state_dict().items():
        value.copy_(_like(value, state[name]))


def _read(objective: CompositeObjective, path: Path) -> tuple[dict[str, Tensor], str]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(
            f"load: {path} does not exist, expected the sidecar that handle.save(folder) writes"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"load: {path} is damaged ({' '.join(str(error).split())}), expected another copy"
        ) from error
    got, expected = metadata.get("spec", "none"), _spec(objective)
    found = checksum(state, got)
    if metadata.get("sha256", found) != found:  # a file of an earlier version has none
        raise ValueError(
            f"load: {path} is damaged (its checksum does not match), expected another copy"
        )
    if got != expected:
        raise ValueError(f"load: {path} has the spec {got}, expected {expected}")
    shapes = {
        name: tuple(_checked("load", name, value).shape) for name, value in _own(objective).items()
    }
    if shapes != (there := {name: tuple(value.shape) for name, value in state.items()}):
        raise ValueError(f"load: {path} holds {there}, expected {shapes}")
    return state, found


def _spec(objective: CompositeObjective) -> str:
    return json.dumps(objective.spec.to_dict())


def _own(objective: CompositeObjective) -> dict[str, Tensor]:
    """The parameters themselves: a detached one no longer says that DeepSpeed has partitioned it."""
    return objective.state_dict(keep_vars=True)


def _checked(function: str, name: str, value: Tensor) -> Tensor:
    if hasattr(value, "ds_id"):
        raise NotImplementedError(
            f"{function}: {name} is partitioned by DeepSpeed ZeRO-3, expected a whole parameter"
        )
    if value.is_meta:
        raise ValueError(
            f"{function}: {name} is on the meta device, expected values "
            "(objective.materialize(device))"
        )
    return value


def _whole(value: Tensor) -> Tensor:
    if is_dtensor(value):
        value = value.full_tensor()  # type: ignore[attr-defined]
    return value.detach().cpu().contiguous()


def _like(own: Tensor, value: Tensor) -> Tensor:
    if not is_dtensor(own):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)  # type: ignore[attr-defined]
