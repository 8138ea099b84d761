"""The own parameters of an objective, in a file of their own beside a training checkpoint.

They exist in training only: no exported model holds them, and no training resumes without them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from nitp_ops.objectives import CompositeObjective

FILE = "nitp_objective.pt"


def save(objective: CompositeObjective, folder: str | os.PathLike[str]) -> Path:
    """Write ``folder/nitp_objective.pt``: the spec and the own parameters, whole (also where ranks hold shards).

    Every rank calls it; rank 0 writes, by renaming, so that no half file is left behind.
    """
    path = Path(folder) / FILE
    content = state_dict(objective)
    if not dist.is_initialized() or dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(content, partial)
        partial.replace(path)
    return path


def load(objective: CompositeObjective, folder: str | os.PathLike[str]) -> None:
    """Read what `save` wrote back into the own parameters, on every rank.

    Raises:
        FileNotFoundError: no such file: the checkpoint is of a training without the objective.
        ValueError: the file is of another spec.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"sidecar: {path} is missing, expected the own parameters of the objective")
    load_state_dict(objective, torch.load(path, map_location="cpu", weights_only=True), str(path))


def state_dict(objective: CompositeObjective) -> dict[str, Any]:
    """``{"spec": the mapping that spells it, "parameters": {name: tensor}}``, whole tensors on the CPU."""
    if any(hasattr(parameter, "ds_id") for parameter in objective.parameters()):
        raise NotImplementedError("sidecar: the own parameters are partitioned by ZeRO-3, expected tensors or DTensors")
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {"spec": objective.spec.to_dict(), "parameters": get_model_state_dict(objective, options=whole)}


def load_state_dict(objective: CompositeObjective, content: dict[str, Any], origin: str = "the checkpoint") -> None:
    """The inverse of `state_dict`; ``origin`` names the source in errors.

    Raises:
        ValueError: the content is of another spec.
    """
    spec = objective.spec.to_dict()
    if content["spec"] != spec:
        raise ValueError(f"sidecar: {origin} is of the objective {content['spec']}, expected {spec}")
    set_model_state_dict(objective, content["parameters"], options=StateDictOptions(full_state_dict=True))
