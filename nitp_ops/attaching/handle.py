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

from nitp_ops.engine.modules.module_call import is_fully_sharded
from nitp_ops.engine.spec.validation import is_int, of_64_bits
from nitp_ops.engine.streams.needs import reads
from nitp_ops.engine.streams.streams import LabelLayout
from nitp_ops.objectives import CompositeObjective, Counts, Metrics, Streams

from . import sidecar
from .attached_forward import HANDLE, AttachedForward
from .attached_model import OBJECTIVE, AttachedModel, check_parameters
from .batch_streams import has_labels, label_count, token_streams, with_prompt
from .inspection.hugging_face import active_copy, virtual_tokens
from .inspection.loss_function import class_loss
from .optimizers import check_optimizers
from .state_dicts import expect_none, leave_out
from .tapping import Tap
from .window_shares import (
    AUX_LOSS,
    adds_a_loss,
    counts_by_share,
    external_output,
    with_model_loss,
)

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
            plain.register_state_dict_post_hook(leave_out),
            plain.register_load_state_dict_post_hook(expect_none),
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
        check_parameters(self.objective)
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
        if not self._plain.training or not has_labels(call):
            return self._plain_forward(*args, **kwargs)
        if call.get("fused_lm_head"):
            raise ValueError(
                "attach: fused_lm_head is True, expected a trainer of nitp_ops.trainers.trl"
            )
        head = self._plain.get_output_embeddings()
        self._attached.check(active_copy(head))
        if torch.compiler.is_compiling():
            self._check_untraced()
        else:
            self._attached.check_untraced(self._plain, head)
        self._attached.check_ties(self._plain)
        fields = token_streams(call)
        out, zero = self._run_plain(call, fields)
        streams = self._tapped_streams(out, fields, active_copy(head))
        counts, items = self._counts, call.get("num_items_in_batch")
        if counts is None and items is not None:
            counts = counts_by_share(self.objective, streams, fields, items)
        loss, metrics = self.objective(
            streams, counts=counts, step=self._step, gradient_reduction=self._gradient_reduction
        )
        if AUX_LOSS not in self._external and adds_a_loss(out, zero):
            loss, metrics = with_model_loss(
                loss, metrics, out.loss, counts, self._gradient_reduction
            )
        if counts is not self._counts:
            # the share of no label is zero
            metrics = metrics.contributing(label_count(fields) > 0)
        self.metrics = metrics
        if self._exact is not None:
            self._exact.append(loss)
        out = type(out)(**{**out, "loss": loss, "logits": None})
        return out.to_tuple() if call.get("return_dict") is False else out

    def _run_plain(
        self, call: Mapping[str, Any], fields: Mapping[str, Any]
    ) -> tuple[Any, Tensor | None]:
        """(the output of the model's own forward without logits, the zero that stood for its
        loss); the tap collects meanwhile."""
        labels: Tensor = fields["shift_labels"] if "shift_labels" in fields else fields["labels"]
        call = {**call, "labels": labels, "return_dict": True}
        call["logits_to_keep"] = torch.empty(0, dtype=torch.long, device=labels.device)
        if call.get("use_cache") is None:
            call["use_cache"] = False
        if AUX_LOSS in self._external and call.get("output_router_logits") is None:
            call["output_router_logits"] = True
        # Liger-Kernel's forward: else it computes a loss of its own
        if "skip_logits" in self._names:
            call["skip_logits"] = False
        self._tap.start()
        try:
            out = self._plain_forward(**call)
        finally:
            self._tap.stop()
            zero, self._zero = self._zero, None
        return out, zero

    def _tapped_streams(
        self, out: Any, fields: Mapping[str, Any], head: nn.Module | None
    ) -> Streams:
        modules: dict[str, Any] = {"head": head}
        if self._reads_embed:
            modules["embed"] = self._plain.get_input_embeddings()
        external = {name: external_output(out, name) for name in self._external}
        return self._tap.streams(
            **fields, **modules, label_layout=self.label_layout, external=external
        )

    @torch.compiler.assume_constant_result
    def _check_untraced(self) -> None:
        """torch.compile runs this each time that it traces the pass, and leaves it out of what it
        compiles."""
        self._attached.check_untraced(self._plain, self._plain.get_output_embeddings())

    def _plain_forward(self, *args: Any, **kwargs: Any) -> Any:
        own = self._before_attach.get("forward")
        if own is not None:
            return own(*args, **kwargs)
        # unbound: where torch.compile breaks its graph inside, it looks a bound method up again by
        # its name
        return type(self._plain).forward(self._plain, *args, **kwargs)

    def _loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """Stands for ``model.loss_function``: zero in a training pass, where there are no logits."""
        if self._tap.collecting:
            labels = kwargs["labels"] if "labels" in kwargs else args[1]
            self._zero = torch.zeros((), device=labels.device)
            return self._zero
        own = self._before_attach.get("_loss_function")
        function = class_loss(self._plain) if own is None else own
        return function(*args, **kwargs)

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
        if isinstance(output, tuple):
            return (*exact, *output[1:])
        return type(output)(**{**output, "loss": exact[0]})

    def _trains(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        call = dict(zip(self._names, args, strict=False)) | kwargs if args else kwargs
        return module.training and has_labels(call)
