"""What a LightningModule holds: the model to attach to, a handle, or an objective of its own."""

from __future__ import annotations

from torch import nn

from nitp_ops.attaching.attached_forward import HANDLE
from nitp_ops.attaching.handle import Handle
from nitp_ops.attaching.hook_points import is_hugging_face
from nitp_ops.engine.parsing import SpecLike
from nitp_ops.objectives import CompositeObjective, parse


def hugging_face_model(module: nn.Module) -> nn.Module:
    found = [each for each in module.children() if is_hugging_face(each)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(name for name, _ in module.named_children())
    raise ValueError(
        f"lightning: the module has {len(found)} Hugging Face models among {names}, expected one, "
        "or model= its name"
    )


def handle_of_earlier_fit(model: nn.Module, spec: SpecLike) -> Handle | None:
    found = [each.__dict__[HANDLE] for each in model.modules() if HANDLE in each.__dict__]
    if not found:
        return None
    held: Handle = found[0]
    got = held.objective.spec.to_dict()
    expected = parse(spec, held.objective.info).to_dict()
    if got != expected:
        raise ValueError(
            f"lightning: the model has the objective {got}, expected {expected} (or "
            "handle.detach() first)"
        )
    return held


def refuse_attached(module: nn.Module) -> None:
    for name, each in module.named_modules():
        if HANDLE in each.__dict__:
            raise ValueError(
                f"lightning: spec is None and {name} is attached already, expected the spec that "
                "it was attached with (None: the module builds its streams itself)"
            )


def only_objective(module: nn.Module) -> CompositeObjective:
    found = [each for each in module.modules() if isinstance(each, CompositeObjective)]
    if len(found) != 1:
        raise ValueError(
            f"lightning: spec is None and the module holds {len(found)} objectives, expected a "
            "spec or one of them"
        )
    return found[0]
