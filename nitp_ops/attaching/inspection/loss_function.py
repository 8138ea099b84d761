"""Whether a model's ``loss_function`` is the cross-entropy of next tokens, whose place an objective
takes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from nitp_ops.attaching.attached_forward import HANDLE


def check_loss_function(model: Any, device: torch.device) -> None:
    """Measured on a few logits, whatever function it is: one of transformers, of nitp_ops, of a
    kernel.

    Args:
        model: the model. device: where it computes; on the meta device the CPU stands for it.

    Raises:
        ValueError: it is another loss: of labels of their own position, of other targets, weighted
            or smoothed. Or it replaced the model's own and fails on logits, labels and
            vocab_size.
    """
    device = torch.device("cpu") if device.type == "meta" else device
    logits = torch.tensor([[[2.0, -1, 0.5, 0], [-1.5, 3, 0, 1], [0.5, 0.5, -2, 1], [1, 0, 0, 4]]])
    labels = torch.tensor([[0, 3, -100, 2]])
    try:
        with torch.no_grad():
            value = float(
                model.loss_function(
                    logits=logits.to(device), labels=labels.to(device), vocab_size=4
                )
            )
    except Exception as error:
        if "_loss_function" not in model.__dict__ or HANDLE in model.__dict__:
            return  # the model's own, of more arguments, of which nothing can be said
        raise ValueError(
            f"attach: model.loss_function was replaced by {_name(model.loss_function)}, which "
            f"fails on logits, labels and vocab_size ({type(error).__name__}: "
            f"{' '.join(str(error).split())}), expected the cross-entropy of next tokens (in "
            "training the objective is the loss)"
        ) from error
    if math.isclose(value, F.cross_entropy(logits[0], labels[0]).item(), rel_tol=1e-4):
        raise ValueError(
            f"attach: the {type(model).__name__}'s loss_function counts the label of the first "
            "token, expected a loss of next tokens, whose labels are shifted by one"
        )
    expected = F.cross_entropy(logits[0, :-1], labels[0, 1:]).item()
    if not math.isclose(value, expected, rel_tol=1e-4):
        raise ValueError(
            f"attach: the {type(model).__name__}'s loss_function, {_name(model.loss_function)}, "
            f"gives {value:g} where the cross-entropy of next tokens is {expected:g}, expected "
            "that one: in training the objective is the loss, and this one would be dropped (put "
            "it into the spec, such as ntp(label_smoothing=0.1))"
        )


def _name(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"


def class_loss(model: Any) -> Any:
    """``model.loss_function`` as its class defines it."""
    own = model.__dict__.pop("_loss_function")
    try:
        return model.loss_function
    finally:
        model.__dict__["_loss_function"] = own
