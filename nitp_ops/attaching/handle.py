"""What `attach` leaves on a model: a forward that trains the objective, and the handle that steers
it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nitp_ops.core.devices import sum_dtype
from nitp_ops.engine.modules.module_call import is_fully_sharded
from nitp_ops.engine.spec.validation import is_int, of_64_bits
from nitp_ops.engine.streams.needs import reads
from nitp_ops.engine.streams.streams import LabelLayout
from nitp_ops.objectives import CompositeObjective, Counts, Metrics, Streams

from . import sidecar
from .attached_forward import HANDLE, AttachedForward
from .attached_model import OBJECTIVE, AttachedModel, check_own_parameters
from .batch_streams import label_count, token_streams, with_prompt
from .inspection.hugging_face import active_copy, head_of, virtual_tokens
from .optimizers import check_optimizers
from .tapping import Tap

# where Hugging Face models put the balance loss of their experts; the part of the loss that a model
# adds itself
AUX_LOSS = "aux_loss"
_REPLACED = ("forward", "_loss_function", "_keys_to_ignore_on_save")


class Handle:
    """What `attach` returns.

    Attributes:
        objective: also ``model.nitp_objective``.
        metrics: of the last training pass, None before the first; add them up over a window, see
            `Metrics`. What the model adds to its loss is the part "aux_loss".
        label_layout: of the shift_labels that are counted and trained on from now on, see
            `Streams`.
    """

    def __init__(
        self,
        model: nn.Module,
        plain: Any,
        objective: CompositeObjective,
        tap: Tap,
        label_layout: LabelLayout = "document",
    ) -> None:
        self.objective = objective
        self.label_layout: LabelLayout = label_layout
        self.metrics: Metrics | None = None
        self._model, self._plain, self._tap = model, plain, tap
        self._counts: Counts | None = None
        self._gradient_reduction: Literal["mean", "sum"] = "mean"
        self._step: Tensor | None = None
        self._zero: Tensor | None = None
        self._ran = False
        self._exact: list[Tensor] | None = None
        self._before_attach = {
            name: plain.__dict__[name] for name in _REPLACED if name in plain.__dict__
        }
        self._names = tuple(inspect.signature(plain.forward).parameters)
        self._attached = AttachedModel(plain, objective, tap)
        self._reads_embed = reads(objective.requires, "embed")
        self._external = [need.name for need in objective.requires if need.name is not None]
        setattr(plain, OBJECTIVE, objective)
        plain.__dict__[HANDLE] = self
        plain.forward = AttachedForward(plain)
        plain.loss_function = self._loss
        own = {f"{OBJECTIVE}.{name}" for name in objective.state_dict()}
        plain._keys_to_ignore_on_save = {
            *(getattr(plain, "_keys_to_ignore_on_save", None) or ()),
            *own,
        }
        after = model.register_forward_hook(self._after, with_kwargs=True)
        self._last_hook = after.id
        self._hooks = [
            after,
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            plain.register_state_dict_post_hook(_leave_out),
            plain.register_load_state_dict_post_hook(_expect_none),
        ]
        tap.install()

    def set_step(self, step: int) -> None:
        """The number of the optimizer step, for scheduled weights.

        Raises:
            ValueError: no integer >= 0.
        """
        if not is_int(step) or step < 0:
            raise ValueError(
                f"set_step: step is {step!r}, expected an integer{of_64_bits(step)} >= 0"
            )
        self._step = torch.tensor(step)  # a tensor keeps torch.compile from recompiling

    def set_counts(
        self, counts: Counts | None, *, gradient_reduction: Literal["mean", "sum"] = "mean"
    ) -> None:
        """Counts of the window, for the training passes that follow.

        Args:
            counts: of all its microbatches (and ranks): the losses of the passes then add up to
                that of the window, so do not divide by the number of passes. What the model adds to
                its loss is averaged over ``counts.batches``. None: each pass counts itself, or is
                weighted by its share of ``num_items_in_batch`` where the call brings it.
            gradient_reduction: see `CompositeObjective.forward`.
        """
        self._counts, self._gradient_reduction = counts, gradient_reduction

    def count(self, batch: Mapping[str, Any]) -> Counts:
        """Counts of a batch, the keywords of a forward call; add them over the window, all-reduce
        them over ranks."""
        return self.objective.count(self.tokens(batch))

    def tokens(self, batch: Mapping[str, Any]) -> Streams:
        """The token streams of a batch, the keywords of a forward call."""
        fields = token_streams(batch)
        prompt = virtual_tokens(self._model)
        fields = with_prompt(fields, prompt) if prompt else fields
        return Streams(**fields, label_layout=self.label_layout)

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """See that the optimizer trains the objective's own parameters, and of a sharded model the
        shards.

        Raises:
            ValueError: an own parameter is frozen, on the meta device, or in no group of the
                optimizer; a parameter in it is a gathered copy of one that fully_shard has cut.
        """
        check_own_parameters(self.objective)
        check_optimizers("check", self._plain, self.objective, [optimizer])

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the own parameters and the spec into a folder, see `sidecar.save`."""
        return sidecar.save(self.objective, folder)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Read them back, see `sidecar.load`."""
        sidecar.load(self.objective, folder)

    def detach(self) -> None:
        """Leave the plain model behind: no hook, no attribute, no parameter of ours.

        A forward that someone wrapped around ours stays, and ours inside it becomes the plain one.
        """
        plain = self._plain
        if plain.__dict__.get(HANDLE) is not self:
            raise ValueError(
                "detach: the objective is detached already, expected one detach an attach"
            )
        for hook in self._hooks:
            hook.remove()
        self._tap.remove()
        wrapped = not isinstance(plain.__dict__.get("forward"), AttachedForward)
        for name in _REPLACED[1:] if wrapped else _REPLACED:
            plain.__dict__.pop(name, None)
            if name in self._before_attach:
                plain.__dict__[name] = self._before_attach[name]
        del plain.__dict__[HANDLE]
        delattr(plain, OBJECTIVE)

    def _pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's forward: the plain one, or in training with labels the objective's."""
        self._ran = True
        call = dict(zip(self._names, args, strict=False)) | kwargs
        if not self._plain.training or not _has_labels(call):
            return self._plain_forward(*args, **kwargs)
        if call.get("fused_lm_head"):
            raise ValueError(
                "attach: fused_lm_head is True, expected a trainer of nitp_ops.trainers.trl"
            )
        head = self._plain.get_output_embeddings()
        self._attached.check(active_copy(head))
        self._check_untraced() if torch.compiler.is_compiling() else self._attached.check_untraced(
            self._plain, head
        )
        self._attached.check_ties(self._plain)
        fields = token_streams(call)
        labels: Tensor = fields["shift_labels"] if "shift_labels" in fields else fields["labels"]
        tuples = call.get("return_dict") is False
        call |= {"labels": labels, "return_dict": True}
        call["logits_to_keep"] = torch.empty(0, dtype=torch.long, device=labels.device)
        defaults = {"use_cache": False} | (
            {"output_router_logits": True} if AUX_LOSS in self._external else {}
        )
        call |= {name: value for name, value in defaults.items() if call.get(name) is None}
        # Liger-Kernel's forward: else it computes a loss of its own
        if "skip_logits" in self._names:
            call["skip_logits"] = False
        self._tap.start()
        try:
            out = self._plain_forward(**call)
        finally:
            self._tap.stop()
            zero, self._zero = self._zero, None
        streams = self._tap.streams(
            **fields,
            label_layout=self.label_layout,
            external={name: self._given(out, name) for name in self._external},
            head=active_copy(head),
            **({"embed": self._plain.get_input_embeddings()} if self._reads_embed else {}),
        )
        counts = self._window(streams, fields, call.get("num_items_in_batch"))
        loss, self.metrics = self.objective(
            streams, counts=counts, step=self._step, gradient_reduction=self._gradient_reduction
        )
        if AUX_LOSS not in self._external:
            loss = self._with_own_loss(loss, out, zero, counts)
        if counts is not self._counts:
            assert self.metrics is not None
            # the share of no label is zero
            self.metrics = self.metrics.contributing(label_count(fields) > 0)
        if self._exact is not None:
            self._exact.append(loss)
        out = type(out)(**{**out, "loss": loss, "logits": None})
        return out.to_tuple() if tuples else out

    @torch.compiler.assume_constant_result
    def _check_untraced(self) -> None:
        """torch.compile runs this each time that it traces the pass, and leaves it out of what it
        compiles."""
        self._attached.check_untraced(self._plain, self._plain.get_output_embeddings())

    def _plain_forward(self, *args: Any, **kwargs: Any) -> Any:
        own = self._before_attach.get("forward")
        # unbound: where torch.compile breaks its graph inside, it looks a bound method up again by
        #     its name
        return (
            type(self._plain).forward(self._plain, *args, **kwargs)
            if own is None
            else own(*args, **kwargs)
        )

    def _loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """Stands for ``model.loss_function``: zero in a training pass, where there are no logits."""
        if self._tap.collecting:
            self._zero = torch.zeros(
                (), device=kwargs["labels"].device if "labels" in kwargs else args[1].device
            )
            return self._zero
        own = self._before_attach.get("_loss_function")
        return (_class_loss(self._plain) if own is None else own)(*args, **kwargs)

    def _given(self, out: Any, name: str) -> Tensor:
        value = getattr(out, name, None)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"attach: the model returns no {name}, expected one (external[{name}] is required)"
            )
        return value

    def _window(
        self, streams: Streams, fields: Mapping[str, Any], items: Tensor | int | None
    ) -> Counts | None:
        """Counts of the window. Where only its number of labels is known, the mean of each term is
        weighted by this batch's share of them: COUNT = count * items / labels."""
        if self._counts is not None or items is None:
            return self._counts
        labels = label_count(fields)
        inverse = (
            torch.as_tensor(items, dtype=sum_dtype(labels.device), device=labels.device) / labels
        )
        # 0 / 0 where the whole window has no label
        inverse = torch.where(labels == 0, torch.inf, inverse)
        counts = self.objective.count(streams).items()
        return Counts(
            {part: count.clamp(min=1) * inverse for part, count in counts}, batches=inverse
        )

    def _with_own_loss(
        self, loss: Tensor, out: Any, zero: Tensor | None, counts: Counts | None
    ) -> Tensor:
        """The objective, and what the model added to a cross-entropy of zero (see `_loss`) as a
        mean over the batches of the window: in the metrics a part beside the others, absent where
        the model added nothing."""
        assert self.metrics is not None
        own: Tensor = out.loss
        # most models add in place
        if own is zero and not own.requires_grad and getattr(out, AUX_LOSS, None) is None:
            return loss
        one = torch.ones_like(own)
        self.metrics = Metrics(
            self.metrics.sums
            | {AUX_LOSS: {"weighted": own, "denominator": one, "loss": own, "count": one}}
        )
        if counts is not None:
            ranks = counts.group_size if self._gradient_reduction == "mean" else 1
            batches = torch.as_tensor(
                counts.batches, dtype=sum_dtype(own.device), device=own.device
            )
            own = own * (ranks / batches).to(own.dtype)
        return loss + own

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._ran, self._exact = False, None
        if is_fully_sharded(module):
            self._exact = []
            module._forward_hooks.move_to_end(self._last_hook)  # type: ignore[attr-defined]
        if self._trains(module, args, kwargs) and not torch.compiler.is_compiling():
            self._attached.check_forward(self._plain)
            self._attached.check_loss(self._plain, self)

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if not self._ran and self._trains(module, args, kwargs):
            name = getattr(self._plain.forward, "__qualname__", repr(self._plain.forward))
            raise RuntimeError(
                f"attach: model.forward was replaced by {name}, expected attach after that "
                "replacement"
            )
        exact, self._exact = self._exact, None
        if not exact or output[0].dtype == exact[0].dtype:
            return output
        # the policy's output_dtype is for hidden states and logits; FSDP2 watches the loss itself,
        # not the copy it cast
        return (
            (*exact, *output[1:])
            if isinstance(output, tuple)
            else type(output)(**{**output, "loss": exact[0]})
        )

    def _trains(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return module.training and _has_labels(
            dict(zip(self._names, args, strict=False)) | kwargs if args else kwargs
        )


def _has_labels(call: Mapping[str, Any]) -> bool:
    return call.get("labels") is not None or call.get("shift_labels") is not None


def _class_loss(model: Any) -> Any:
    """``model.loss_function`` as its class defines it."""
    own = model.__dict__.pop("_loss_function")
    try:
        return model.loss_function
    finally:
        model.__dict__["_loss_function"] = own


def _leave_out(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}{OBJECTIVE}.")]:
        del state[name]


def _expect_none(module: Any, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if f".{OBJECTIVE}." not in f".{key}"]
    # whoever refills a model from the meta device has no values for what is not in its state dict
    weight = getattr(head_of(module), "weight", None)
    if isinstance(weight, Tensor) and not weight.is_meta:
        getattr(module, OBJECTIVE).materialize(weight.device)
