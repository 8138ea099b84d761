"""torchtitan: its Trainer with one flag more, ``--objective "ntp + 0.8*nitp(target_layer=0.2)"``.

    def llama3_nitp():  # a config function, as --module and --config find it
        return with_objective(llama3_8b(), "ntp + 0.8*nitp(target_layer=0.2)")

Training computes the objective in place of the loss of the config, over the counts of all
microbatches and ranks of a step; validation keeps the loss of the config. Its data shifts labels
inside each document and restarts the positions in every one, so that "ntp" is torchtitan's own
loss: a document's last label, its end of text, is a target (`Streams`,
``label_layout="document"``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .requirements import check_streams, check_version

check_version("torchtitan", "0.3", "0.4")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: E402
from torchtitan.config import derive  # noqa: E402
from torchtitan.models.common.decoder import Decoder  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402

from nitp_ops.attaching.attached_model import OBJECTIVE  # noqa: E402
from nitp_ops.attaching.state_dicts import leave_out  # noqa: E402
from nitp_ops.attaching.tapping import Tap, tap  # noqa: E402
from nitp_ops.engine.parsing import SpecLike  # noqa: E402
from nitp_ops.objectives import (  # noqa: E402
    CompositeObjective,
    Counts,
    Metrics,
    ModelInfo,
    Output,
    Streams,
    build,
)

from .torchtitan_checks import check_config, check_decoder  # noqa: E402

_Batch = tuple[dict[str, Tensor], Tensor]


def with_objective(config: Trainer.Config, spec: str) -> ObjectiveTrainer.Config:
    """The config of an `ObjectiveTrainer` with everything that `config` says.

    Args:
        config: of torchtitan's Trainer, as a config function returns it. spec: an expression, see
            `parse`; the flag ``--objective`` replaces it.

    Raises:
        TypeError: the config of another Trainer, whose class would be lost.
    """
    if type(config) is not Trainer.Config:
        got = f"{type(config).__module__}.{type(config).__qualname__}"
        raise TypeError(
            f"torchtitan: config is a {got}, expected that of torchtitan's own Trainer (another "
            "one: derive its class from ObjectiveTrainer)"
        )
    return derive(config, ObjectiveTrainer.Config, objective=spec)


def attach_decoder(model: Decoder, spec: SpecLike, *, seed: int = 0) -> CompositeObjective:
    """Build the objective of a torchtitan decoder and register it as ``model.nitp_objective``;
    returns it.

    It is left out of ``model.state_dict()``, which is what is exported. After the meta device,
    `draw` its parameters.

    Raises:
        TypeError: no decoder whose logits are ``lm_head(norm(h))``. ValueError: it has MTP layers
            or an objective already; a stream is required that a decoder does not provide.
            SpecError: the spec is wrong, or wrong for this model.

    Example:
        >>> from torchtitan.models.llama3 import model_registry
        >>> with torch.device("meta"):
        ...     model = model_registry("debugmodel").model.build()
        >>> sorted(map(str, attach_decoder(model, "ntp + 0.8*nitp(target_layer=0.2)").requires))
        ['head', 'hidden_states[1]', 'last_hidden', 'token_ids']
    """
    check_decoder(model)
    if hasattr(model, OBJECTIVE):
        raise ValueError(f"torchtitan: model has a {OBJECTIVE} already, expected a model without")
    weight = model.lm_head.weight
    info = ModelInfo(
        hidden_size=weight.shape[1],
        vocab_size=weight.shape[0],
        num_layers=len(model.layers),
        dtype=weight.dtype,
    )
    with torch.device(weight.device):
        objective = build(spec, model=info, seed=seed)
    check_streams("torchtitan", objective.requires)
    model.add_module(OBJECTIVE, objective)
    model.register_state_dict_post_hook(leave_out)
    return objective


def tap_decoder(model: Decoder) -> Tap:
    """The tap of a decoder with an objective, its hooks installed: after activation checkpointing
    and compile were applied, before the first forward pass."""
    objective: Any = getattr(model, OBJECTIVE)
    return tap(
        model, objective, blocks="layers", norm="norm", embed="tok_embeddings", head="lm_head"
    ).install()


@torch.no_grad()
def draw(objective: CompositeObjective, *, seed: int = 0) -> None:
    """Give the own parameters their initial values, also where they are shards."""
    fresh = build(objective.spec, model=objective.info, seed=seed)
    mine = [*objective.parameters(), *objective.buffers()]
    values = [*fresh.parameters(), *fresh.buffers()]
    for old, new in zip(mine, values, strict=True):
        new = new.to(old.device)
        if isinstance(old, DTensor):
            new = distribute_tensor(new, old.device_mesh, old.placements)
        old.copy_(new)


def objective_loss(
    model: Decoder,
    tapped: Tap,
    inputs: Tensor,
    labels: Tensor,
    *,
    counts: Counts | None = None,
    step: int | None = None,
    **extra: Any,
) -> Output:
    """Loss and metrics of one microbatch; ranks and microbatches add up, as torchtitan's gradients
    do.

    The objective runs inside the ``__call__`` of the model, where FSDP has gathered its parameters,
    and no logits are built.

    Args:
        model: with an objective (`attach_decoder`). tapped: see `tap_decoder`.
        inputs: token ids [B, T]. labels: [B, T], pre-shifted inside each document.
        counts: of the whole step. step: for scheduled weights. extra: of the decoder's forward;
            documents derive from ``positions`` [B, T].
    """
    plain, own = model.forward, model.__dict__.get("forward")
    objective: Any = getattr(model, OBJECTIVE)

    def with_loss(inputs: Tensor, **extra: Any) -> Output:
        skip, model._skip_lm_head = model._skip_lm_head, True
        try:
            with tapped:
                plain(inputs, **extra)
        finally:
            model._skip_lm_head = skip
        fields = _fields(inputs, labels, extra.get("positions"))
        return objective(
            tapped.streams(**fields), counts=counts, step=step, gradient_reduction="sum"
        )

    model.forward = with_loss  # type: ignore[method-assign, assignment]
    try:
        return model(inputs, **extra)
    finally:
        del model.forward
        if own is not None:
            model.forward = own


class ObjectiveTrainer(Trainer):
    """torchtitan's Trainer, with the loss that ``config.objective`` declares.

    Own parameters are registered before FSDP and the optimizer see the model. They are saved with
    the state of the trainer, never with the model. The parts of the loss are logged as
    ``objective/<name>``.

    Raises:
        ValueError: (when it is made) the config asks for what the objective can not run under; the
            message says what to do instead.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        objective: str = "ntp"
        """Training objective, for instance "ntp + 0.8*nitp(target_layer=0.2)"."""

    def __init__(self, config: Config) -> None:
        check_config(config)
        assert config.model_spec is not None
        parallelize = config.model_spec.parallelize_fn

        def with_parameters(model: Decoder, **options: Any) -> nn.Module:
            attach_decoder(model, config.objective)
            return parallelize(model, **options)

        config.model_spec.parallelize_fn = with_parameters
        try:
            super().__init__(config)
        finally:
            config.model_spec.parallelize_fn = parallelize
        self.objective: CompositeObjective = getattr(self.model_parts[0], OBJECTIVE)
        draw(self.objective)
        self._tap = tap_decoder(self.model_parts[0])  # type: ignore[arg-type]
        self._counts: Counts | None = None
        self._metrics: Metrics | None = None

    def train_step(self, data_iterator: Iterator[_Batch]) -> None:
        """One optimizer step; its microbatches are read ahead, because their counts come first."""
        window = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        counted = [
            self.objective.count(Streams(**_fields(batch["input"], labels, batch.get("positions"))))
            for batch, labels in window
        ]
        counts = sum(counted[1:], start=counted[0]).to(self.device)
        if self.parallel_dims.dp_enabled:
            counts = counts.all_reduce(self.parallel_dims.get_mesh("batch").get_group())
        self._counts, self._metrics = counts, None
        super().train_step(iter(window))
        if self.metrics_processor.should_log(self.step):
            self._log()

    def _forward_backward_body(
        self,
        inputs: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor,
        extra_kwargs: dict[str, Any],
    ) -> Tensor:
        with self.train_context():
            model: Any = self.model_parts[0]
            out = objective_loss(
                model,
                self._tap,
                inputs,
                labels,
                counts=self._counts,
                step=self.step - 1,
                **extra_kwargs,
            )
            out.loss.backward()
        self._metrics = out.metrics if self._metrics is None else self._metrics + out.metrics
        return out.loss

    def _log(self) -> None:
        assert self._metrics is not None
        metrics = self._metrics
        if self.parallel_dims.dp_cp_enabled:
            metrics = metrics.all_reduce(self.parallel_dims.get_mesh("loss").get_group())
        values = {f"objective/{name}": value for name, value in metrics.compute().items()}
        self.metrics_processor.logger.log(values, self.step)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {OBJECTIVE: self.objective.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.objective.load_state_dict(state_dict[OBJECTIVE])


def _fields(inputs: Tensor, labels: Tensor, positions: Tensor | None) -> dict[str, Any]:
    fields = {"token_ids": inputs, "shift_labels": labels, "position_ids": positions}
    return fields | {"label_layout": "document"}
