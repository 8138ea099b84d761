"""Attaching an objective to a Hugging Face model, in place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nitp_ops.objectives import CompositeObjective, Counts, Metrics, Streams, build
from nitp_ops.objectives.spec import SpecLike

from .hugging_face import checked_head, model_info, unwrapped
from .sites import hugging_face_sites
from .tapping import Tap, differentiable_states
from .token_streams import label_count, token_streams

OBJECTIVE = "nitp_objective"
_HANDLE = "nitp_handle"


def attach(model: nn.Module, spec: SpecLike, *, seed: int = 0, backend: str | None = None) -> Handle:
    """Give a Hugging Face causal language model a training objective, in place."""
    plain = unwrapped(model)
    sites = hugging_face_sites(plain)
    checked_head(sites.head)
    objective = build(spec, model=model_info(plain, sites, None, 1.0), seed=seed, backend=backend)
    objective.to(sites.head.weight.device)  # type: ignore[union-attr]
    return Handle(model, plain, objective, Tap(sites, objective.requires, differentiable_states(objective)))


def handle_of(model: nn.Module) -> Handle:
    """The handle of an attached model, also through wrappers (DDP, torch.compile, PEFT).

    Raises:
        ValueError: nothing is attached to the model.
    """
    for module in model.modules():
        if _HANDLE in module.__dict__:
            return module.__dict__[_HANDLE]
    raise ValueError(f"handle_of: model is a {type(model).__name__} without an objective, expected one after attach")


class Handle:
    """What `attach` returns."""

    def __init__(self, model: nn.Module, plain: Any, objective: CompositeObjective, tap: Tap) -> None:
        self.model, self.plain, self.objective, self.tap = model, plain, objective, tap
        self.metrics: Metrics | None = None
        self.counts: Counts | None = None
        self.gradient_reduction: Literal["mean", "sum"] = "mean"
        self.step: Tensor | None = None
        self._ran = False
        self._own_forward = plain.__dict__.get("forward")
        self._own_loss = plain.__dict__.get("_loss_function")
        signature = inspect.signature(plain.forward)
        self._names = tuple(signature.parameters)
        setattr(plain, OBJECTIVE, objective)
        plain.__dict__[_HANDLE] = self
        plain.forward = MethodType(_patched(plain.forward, signature), plain)
        plain.loss_function = self._loss_function
        self._hooks = [
            model.register_forward_pre_hook(self._before),
            model.register_forward_hook(self._after, with_kwargs=True),
            plain.register_state_dict_post_hook(_leave_out),
            plain.register_load_state_dict_post_hook(_expect_no),
        ]
        self._ignored = plain._keys_to_ignore_on_save
        own = {f"{OBJECTIVE}.{name}" for name in objective.state_dict()}
        plain._keys_to_ignore_on_save = {*(self._ignored or ()), *own}
        tap.install()

    def set_step(self, step: int) -> None:
        """The number of the optimizer step, for scheduled weights."""
        self.step = torch.tensor(step)

    def set_counts(self, counts: Counts | None, *, gradient_reduction: Literal["mean", "sum"] = "mean") -> None:
        """Counts of the window (summed over microbatches and ranks) for the training passes that follow; None: each
        pass counts itself, or is weighted by ``num_items_in_batch`` where the call brings it."""
        self.counts, self.gradient_reduction = counts, gradient_reduction

    def count(self, batch: Mapping[str, Any]) -> Counts:
        """Counts of a batch (the keywords of a forward call); add them over the window, all-reduce them over ranks."""
        return self.objective.count(Streams(**token_streams(batch)))

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises ValueError where an own parameter is in no group of the optimizer, or frozen."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in self.objective.named_parameters():
            if id(parameter) not in held:
                raise ValueError(
                    f"check: {name} is in no group of the optimizer, expected model.parameters() after attach"
                )

    def detach(self) -> None:
        """Leave the plain model behind."""
        plain = self.plain
        for hook in self._hooks:
            hook.remove()
        self.tap.remove()
        for name, own in (("forward", self._own_forward), ("_loss_function", self._own_loss)):
            plain.__dict__.pop(name, None)
            if own is not None:
                plain.__dict__[name] = own
        plain._keys_to_ignore_on_save = self._ignored
        del plain.__dict__[_HANDLE]
        delattr(plain, OBJECTIVE)

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._ran = True
        call = dict(zip(self._names, args, strict=False)) | kwargs
        if not self.plain.training or (call.get("labels") is None and call.get("shift_labels") is None):
            return self._call(*args, **kwargs)
        fields = token_streams(call)
        labels = fields.get("labels", fields.get("shift_labels"))
        nothing = torch.empty(0, dtype=torch.long, device=labels.device)  # type: ignore[union-attr]
        tuples = call.get("return_dict") is False
        call |= {"labels": labels, "logits_to_keep": nothing, "return_dict": True}
        call.setdefault("use_cache", False)
        with self.tap:
            out = self._call(**call)
        fields |= {"head": checked_head(self.plain.get_output_embeddings()), "embed": self.plain.get_input_embeddings()}
        streams = self.tap.streams(**fields)
        loss, self.metrics = self.objective(
            streams,
            counts=self._window(streams, fields, call.get("num_items_in_batch")),
            step=self.step,
            gradient_reduction=self.gradient_reduction,
        )
        # the model's own loss is what it adds to a cross-entropy of zero: the balance loss of a mixture of experts
        out = type(out)(**{**out, "loss": loss + out.loss, "logits": None})
        return out.to_tuple() if tuples else out

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self._own_forward is not None:
            return self._own_forward(*args, **kwargs)
        return type(self.plain).forward(self.plain, *args, **kwargs)

    def _loss_function(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.tap.collecting:
            own = self._own_loss if self._own_loss is not None else _class_loss(self.plain)
            return own(*args, **kwargs)
        logits = args[0] if args else kwargs["logits"]
        return logits.new_zeros((), dtype=torch.float32)

    def _window(self, streams: Streams, fields: Mapping[str, Any], items: Tensor | int | None) -> Counts | None:
        """The window's counts; where only its number of labels is known, local means weighted by our share of them."""
        if self.counts is not None or items is None:
            return self.counts
        labels, local = label_count(fields), self.objective.count(streams)
        share = labels / torch.as_tensor(items, device=labels.device)
        return Counts({part: count.clamp(min=1) / share for part, count in local.items()})

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._ran = False

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._ran and module.training:
            raise RuntimeError(
                "attach: model.forward was replaced after attach, expected attach after whoever replaces it"
            )


def _patched(forward: Any, signature: inspect.Signature) -> Any:
    def nitp_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_HANDLE]._forward(args, kwargs)

    functools.update_wrapper(nitp_forward, forward)
    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    nitp_forward.__signature__ = signature.replace(parameters=[me, *signature.parameters.values()])  # type: ignore[attr-defined]
    # accelerate follows __wrapped__ down to a function that it never compares equal to, and would install that one
    del nitp_forward.__wrapped__
    return nitp_forward


def _class_loss(model: Any) -> Any:
    own = model.__dict__.pop("_loss_function")
    try:
        return model.loss_function
    finally:
        model.__dict__["_loss_function"] = own


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}{OBJECTIVE}.")]:
        del state[name]


def _expect_no(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if f".{OBJECTIVE}." not in f".{key}"]
