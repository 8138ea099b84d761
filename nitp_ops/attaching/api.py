"""Attaching an objective to a Hugging Face causal language model, in place."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nitp_ops.engine.parsing import SpecLike
from nitp_ops.engine.streams.needs import reads
from nitp_ops.engine.streams.streams import LabelLayout, check_label_layout
from nitp_ops.objectives import CompositeObjective, build

from .attached_forward import HANDLE
from .handle import Handle
from .hook_points import hugging_face_sites
from .inspection.block_pass import check_required, checked_blocks
from .inspection.hugging_face import (
    checked_head,
    head_of,
    model_info,
    refuse_hooks_on_head,
    unwrapped,
)
from .inspection.logit_transform import head_transform
from .tapping import Tap
from .window_shares import AUX_LOSS


def attach(
    model: nn.Module,
    spec: SpecLike,
    *,
    label_layout: LabelLayout = "document",
    seed: int = 0,
    backend: str | None = None,
) -> Handle:
    """Give a Hugging Face causal language model a training objective, in place.

    In training, a forward call with labels returns the objective's loss as ``out.loss`` and None as
    ``out.logits``: no logits are built beyond a chunk, no hidden state is kept but those that the
    objective reads. Whatever else the model adds to its loss, such as the balance loss of a mixture
    of experts, is still added, as a mean over the batches of a window and as the part "aux_loss" of
    the metrics; a spec that reads ``external[aux_loss]`` takes it over instead. In eval mode,
    without labels and in `generate` it is the plain model, bit for bit.

    Softcap and logit scale are measured on the model's own code. Documents derive from
    attention_mask, position_ids or cu_seq_lens_q. The objective is registered as
    ``model.nitp_objective``: `parameters`, `to`, DDP and fully_shard see its parameters; the
    model's state dict and `save_pretrained` leave them out (`Handle.save`).

    Order: load, PEFT, TRL or Liger, attach, compile, fully_shard or DDP, optimizer.

    Args:
        model: a Hugging Face causal language model, or a PeftModel of one.
        spec: in any spelling, see `nitp_ops.objectives.parse`. seed, backend: see
            `nitp_ops.objectives.build`.
        label_layout: how the ``shift_labels`` of a call were made. "document": inside each
            document, whose last label is then a target; "stream": over the whole row, as loops
            under context parallel make them from labels. What a call brings as ``labels`` has the
            same targets under both.

    Raises:
        SpecError: everything that is wrong with the spec, or with it for this model.
        TypeError: no Hugging Face model.
        ValueError: another label_layout; a model that was attached, compiled, wrapped or sharded
            before; a head that carries an adapter, is quantised or offloaded, or has hooks of
            anybody but an engine; logits that are no scale and softcap of the head's output; a loss
            that does not go through ``model.loss_function``, or is not the cross-entropy of next
            tokens; a required stream that no module passes once, as wide as the head reads, or an
            embedding of another width; the label "aux_loss" for anything but that.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, vocab_size=32)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
        >>> handle = attach(model, "ntp + 0.8*nitp(target_layer=1)")
        >>> import torch
        >>> ids = torch.randint(32, (2, 8))
        >>> out = model.train()(input_ids=ids, labels=ids)
        >>> out.loss.backward()
        >>> out.logits is None, handle.metrics.compute()["nitp/count"]
        (True, 14)
    """
    check_label_layout("attach", label_layout)
    plain = unwrapped(model)
    sites = hugging_face_sites(plain)
    refuse_hooks_on_head(plain.get_output_embeddings())
    head = checked_head(head_of(plain))
    sites = replace(sites, head=head)
    transform = head_transform(plain, plain.forward, sites)
    sites, reasons = checked_blocks(plain, sites)
    # on the meta device nothing is drawn: the values come when the parameters leave it
    with torch.device("meta") if head.weight.is_meta else nullcontext():
        objective = build(
            spec, model=model_info(plain, sites, transform), seed=seed, backend=backend
        )
    check_required(objective.requires, objective.info.num_layers, reasons, type(plain).__name__)
    _check_labels(objective)
    _check_embedding(objective, plain)
    objective.to(head.weight.device)
    sites = replace(sites, trunk=transform.body)
    tapped = Tap(sites, objective.requires, who="attach")
    return Handle(model, plain, objective, tapped, label_layout)


def _check_labels(objective: CompositeObjective) -> None:
    labels = {str(term.label) for term in objective.spec.terms}
    if AUX_LOSS in labels and all(need.name != AUX_LOSS for need in objective.requires):
        raise ValueError(
            f'attach: a term is labelled "{AUX_LOSS}", expected another label (the metrics keep '
            "it for what the model "
            "adds to its loss)"
        )


def _check_embedding(objective: CompositeObjective, plain: Any) -> None:
    """What reads the embedding puts it beside states of the head's width (Reformer's head reads two
    halves of it)."""
    weight = getattr(plain.get_input_embeddings(), "weight", None)
    shape = getattr(weight, "ds_shape", getattr(weight, "shape", ()))
    width, kind = objective.info.hidden_size, type(plain).__name__
    if reads(objective.requires, "embed") and len(shape) == 2 and shape[1] != width:
        readers = [
            str(term.label)
            for term in objective.spec.terms
            if reads(term.requires(objective.info), "embed")
        ]
        raise ValueError(
            f"attach: {', '.join(readers)} reads the embedding, which is {shape[1]} wide in the "
            f"{kind}, expected {width}, the width that its head reads; leave it out of the spec"
        )


def handle_of(model: nn.Module) -> Handle:
    """The handle of an attached model, also through wrappers (DDP, torch.compile, PEFT).

    Raises:
        ValueError: nothing is attached to the model.
    """
    for module in model.modules():
        if HANDLE in module.__dict__:
            return module.__dict__[HANDLE]
    raise ValueError(
        f"handle_of: model is a {type(model).__name__} without an objective, expected one after "
        "attach"
    )
