"""Megatron-Core: an objective for its GPTModel, by its conventions.

    def model_provider(pre_process=True, post_process=True):
        model = GPTModel(...)
        attach_gpt(model, "ntp + 0.8*nitp(target_layer=0.2)")  # before DDP and the optimizer
        return model

    def forward_step(data_iterator, model):
        tokens, labels, loss_mask, attention_mask, position_ids = get_batch(data_iterator)
        return objective_step(model, tokens, position_ids, attention_mask, labels, loss_mask)

Megatron's labels are pre-shifted and its ``loss_mask[t]`` masks ``labels[t]``: the label is masked,
the token that predicts it is not. A label belongs to the document of the position where it stands
(`Streams`, ``label_layout="document"``), so that "ntp" is Megatron's own loss under its own mask.
Its tensors are [T, B, d]; they are read as [B, T, d] without a copy. The whole objective is the
output of ``forward_step``: Megatron's loss scale reaches all of it, no term needs an auxiliary loss
scaler.

Data parallelism only. Tested with GPTModel and `forward_step_calc_loss` on the CPU; Megatron's
DistributedDataParallel, its distributed optimizer and its schedules are not part of the tests,
which have no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from .requirements import check_streams, check_version

check_version("megatron-core", "0.16", "0.17")

import torch  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from nitp_ops.attaching.hook_points import Sites  # noqa: E402
from nitp_ops.attaching.tapping import Tap  # noqa: E402
from nitp_ops.engine.parsing import SpecLike  # noqa: E402
from nitp_ops.engine.streams.needs import named  # noqa: E402
from nitp_ops.objectives import CompositeObjective, Counts, Metrics, ModelInfo, Streams, build  # noqa: E402

OBJECTIVE = "nitp_objective"
_HANDLE = "nitp_gpt"
LossFunction: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


def attach_gpt(
    model: GPTModel, spec: SpecLike, *, seed: int = 0, backend: str | None = None
) -> GPTObjective:
    """Give a GPTModel a training objective, in place; registered as ``model.nitp_objective``.

    In training, with labels, the model then returns the objective (0-d) in place of a loss a token,
    without logits. Otherwise it is the plain model. Own parameters are part of its (sharded) state
    dict.

    Raises:
        TypeError: no GPTModel with the forward of GPTModel. SpecError: the spec is wrong, or wrong
            for this model.
        ValueError: pipeline, tensor or context parallelism, or an MTP block of its own; the reason
            is named. A stream is required that the model does not provide.
    """
    if not isinstance(model, GPTModel) or type(model).forward is not GPTModel.forward:
        raise TypeError(
            f"megatron: model is a {type(model).__name__}, expected a GPTModel with its forward"
        )
    if hasattr(model, OBJECTIVE):
        raise ValueError(f"megatron: model has a {OBJECTIVE} already, expected a model without")
    _refuse(model)
    shared = model.share_embeddings_and_output_weights
    head: Any = model.embedding.word_embeddings if shared else model.output_layer
    info = ModelInfo(
        hidden_size=head.weight.shape[1],
        vocab_size=head.weight.shape[0],
        num_layers=len(model.decoder.layers),
        dtype=head.weight.dtype,
        initializer_range=model.config.init_method_std,
    )
    objective = build(spec, model=info, seed=seed, backend=backend).to(head.weight.device)
    check_streams("megatron", objective.requires)
    norm: Any = model.decoder.final_layernorm
    differentiable = [
        need for need in objective.requires if need.stream == "hidden_states" and need.grad
    ]
    if differentiable and model.config.recompute_granularity == "full":
        raise ValueError(
            'megatron: recompute_granularity is "full", expected None or "selective" (a term '
            "sends a gradient into "
            f"{', '.join(named(differentiable))}, which full recomputation computes without one)"
        )
    sites = Sites(
        blocks=tuple(model.decoder.layers),
        norm=norm,
        trunk=norm,
        embed=model.embedding.word_embeddings,
        head=head,
    )
    return GPTObjective(model, objective, _SequenceFirst(sites, objective.requires).install())


def objective_step(
    model: nn.Module,
    tokens: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    counts: Counts | None = None,
    step: int | None = None,
    **extra: Any,
) -> tuple[Tensor, LossFunction]:
    """What Megatron's ``forward_step`` returns: ``(output, loss_func)``.

    ``loss_func(output)`` is ``(loss * n, n, {name: [sum, n]})``, Megatron's form, with n the
    targets of the microbatch (those of ntp, else of the first term). With
    ``calculate_per_token_loss`` the sums end divided by the n of all microbatches and ranks: exact
    for ntp, and other terms weigh each microbatch by its share of n. With counts of the whole step
    every term is exact.

    Args:
        model: with an objective, perhaps inside DDP or Float16Module.
        tokens, position_ids, labels, loss_mask: [B, T]. Documents derive from position_ids
            (``reset_position_ids``).
        counts: of all microbatches and ranks, see `GPTObjective.count`; needs
            ``calculate_per_token_loss``.
        step: for scheduled weights. extra: of the model's forward.

    Raises:
        ValueError: no objective attached; counts without ``calculate_per_token_loss``.
    """
    handle = next((m.__dict__[_HANDLE] for m in model.modules() if _HANDLE in m.__dict__), None)
    if handle is None:
        raise ValueError(
            f"megatron: model is a {type(model).__name__} without an objective, expected "
            "attach_gpt first"
        )
    if counts is not None and not handle.model.config.calculate_per_token_loss:
        raise ValueError(
            "megatron: counts are given and calculate_per_token_loss is False, expected True "
            "(else Megatron divides each microbatch by its own number of tokens)"
        )
    handle.counts, handle.step = counts, step
    output = model(
        tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask, **extra
    )
    return output, handle.loss_function()


class GPTObjective:
    """What `attach_gpt` returns.

    Attributes:
        objective: the module with the own parameters. metrics: of the last training pass.
    """

    def __init__(self, model: GPTModel, objective: CompositeObjective, tap: Tap) -> None:
        self.model, self.objective, self.tap = model, objective, tap
        self.counts: Counts | None = None
        self.step: int | None = None
        self.metrics: Metrics | None = None
        setattr(model, OBJECTIVE, objective)
        model.__dict__[_HANDLE] = self
        model.forward = self._forward

    def count(
        self, tokens: Tensor, position_ids: Tensor, labels: Tensor, loss_mask: Tensor
    ) -> Counts:
        """Counts of a microbatch: add them over a step, then all-reduce them over the data-parallel
        group."""
        return self.objective.count(Streams(**_fields(tokens, position_ids, labels, loss_mask)))

    def loss_function(self) -> LossFunction:
        """The ``loss_func`` of the last pass, see `objective_step`."""
        metrics, counts = self.metrics, self.counts
        assert metrics is not None
        main = self.objective.spec.main_label or next(iter(metrics.sums))
        tokens = metrics.sums[main]["count"].to(torch.int)
        whole = tokens if counts is None else counts[main].to(tokens.device)

        def loss_func(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            report = {
                f"{part}/loss": torch.stack([own["loss"], own["count"]])
                for part, own in metrics.sums.items()
            }
            loss = output * whole
            return (
                loss,
                tokens,
                {"objective": torch.stack([loss.detach().double(), tokens.double()]), **report},
            )

        return loss_func

    def _forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        *rest: Any,
        **named: Any,
    ) -> Any:
        labels = named.get("labels", rest[1] if len(rest) > 1 else None)
        mask: Any = attention_mask
        if labels is None or not self.model.training:
            return GPTModel.forward(self.model, input_ids, position_ids, mask, *rest, **named)
        if rest:
            raise TypeError(
                f"megatron: {len(rest)} arguments after attention_mask by position, "
                "expected them by name"
            )
        fields = _fields(input_ids, position_ids, labels, named.pop("loss_mask", None))
        with self.tap, _WithoutLogits(self.model.output_layer):
            named["labels"] = None
            GPTModel.forward(self.model, input_ids, position_ids, mask, **named)
        streams = self.tap.streams(**fields)
        loss, self.metrics = self.objective(
            streams, counts=self.counts, step=self.step, gradient_reduction="sum"
        )
        return loss


class _SequenceFirst(Tap):
    """A tap on a model whose tensors are [T, B, d]."""

    def _keep(self, name: str, value: object) -> None:
        super()._keep(name, value.transpose(0, 1) if isinstance(value, Tensor) else value)


class _WithoutLogits:
    """Inside, the output layer returns nothing: the objective reads its weight later."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __enter__(self) -> None:
        self.layer.forward = lambda hidden, **_: (hidden.new_empty(0, 0, 0), None)

    def __exit__(self, *_: object) -> None:
        del self.layer.forward


def _fields(
    tokens: Tensor, position_ids: Tensor, labels: Tensor, loss_mask: Tensor | None
) -> dict[str, Any]:
    if loss_mask is not None:
        labels = labels.masked_fill(loss_mask == 0, -100)
    fields = {"token_ids": tokens, "shift_labels": labels, "position_ids": position_ids}
    return fields | {"label_layout": "document"}


def _refuse(model: GPTModel) -> None:
    config, found = model.config, []
    if not (model.pre_process and model.post_process) or config.pipeline_model_parallel_size > 1:
        found.append(
            f"pipeline_model_parallel_size is {config.pipeline_model_parallel_size}, expected 1 "
            "(the hidden states of a lower layer are on another stage than the loss)"
        )
    if config.tensor_model_parallel_size > 1:
        found.append(
            f"tensor_model_parallel_size is {config.tensor_model_parallel_size}, expected 1 (a "
            "rank holds a slice of the vocabulary in its output layer)"
        )
    if config.context_parallel_size > 1:
        found.append(
            f"context_parallel_size is {config.context_parallel_size}, expected 1 (the next token "
            "of a position may be on another rank)"
        )
    if config.mtp_num_layers:
        found.append(
            f"mtp_num_layers is {config.mtp_num_layers}, expected None (mtp_sequential is the "
            "objective for it)"
        )
    if config.defer_embedding_wgrad_compute:
        found.append(
            "defer_embedding_wgrad_compute is True, expected False (the output layer is not run)"
        )
    if found:
        raise ValueError("; ".join(f"megatron: {problem}" for problem in found))
