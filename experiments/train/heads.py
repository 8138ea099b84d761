"""The weights that an objective trained beside the model, as a file of their own: written on
request only."""

from __future__ import annotations

from pathlib import Path

from experiments.console.failure import BadInput
from nitp_ops.objectives import CompositeObjective, SpecError, build

from .checkpoint import load_weights, read_tensors, write_tensors
from .model import Decoder
from .run import model_info


def export_heads(path: Path, objective: CompositeObjective) -> None:
    """The objective's own weights as safetensors, its spec in the metadata; nothing of the model is
    in it."""
    write_tensors(path, objective.state_dict(), {"spec": objective.spec.to_dict()})


def load_exported(folder: Path) -> tuple[Decoder, CompositeObjective]:
    """The model and the objective of a run with --keep-heads.

    Raises:
        BadInput: a file is missing or damaged, or the two do not fit.
    """
    for name in ("model.safetensors", "heads.safetensors"):
        if not (folder / name).is_file():
            raise BadInput(
                f"{folder / name}: no such file; train with examples/pretrain.py --keep-heads"
            )
    try:
        model = load_weights(folder / "model.safetensors")
        weights, about = read_tensors(folder / "heads.safetensors")
        objective = build(about["spec"], model=model_info(model.config))
        objective.load_state_dict(weights)
    except SpecError:
        raise
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"{folder}: its exported weights do not fit: {' '.join(str(error).split())}"
        ) from error
    return model, objective
