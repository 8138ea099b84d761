"""The Hugging Face Trainer with objectives: counts of the window, contributions in the log, a
sidecar a checkpoint.

    trainer = ObjectiveTrainer(
        model=model, args=args, train_dataset=data, data_collator=collate, objective="ntp + 0.8*nitp"
    )
    trainer.train()

`ObjectiveTrainerMixin` does the same for any subclass of Trainer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import transformers
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from nitp_ops.attaching.api import attach, handle_of
from nitp_ops.attaching.handle import Handle
from nitp_ops.engine.parsing import SpecLike
from nitp_ops.engine.streams.streams import LabelLayout
from nitp_ops.objectives import Counts

from .accelerate import data_parallel_only
from .window import StepLog, count_window

if not hasattr(transformers.Trainer, "loss_is_scaled_for_ga"):
    raise ImportError(
        f"nitp_ops.trainers.transformers: transformers {transformers.__version__} has no "
        "Trainer.loss_is_scaled_for_ga, expected a version that lets a trainer scale its own loss "
        "(5.24 does)"
    )

_Base = transformers.Trainer if TYPE_CHECKING else object


class ObjectiveTrainerMixin(_Base):
    """``class MyTrainer(ObjectiveTrainerMixin, Trainer)``: trains with an objective, one line beside a
    plain Trainer.

    * Every term is divided by its count over the whole accumulation window of all ranks: a batch of
      8, 2 x 4 accumulated and 2 ranks x 4 give the same gradients, for every term, however the
      masks fall. Any other loss (of the experts' balance, or added in a subclass) is averaged over
      the microbatches.
    * The log holds ``loss/ntp``, ``loss/nitp``, ... (they add up to ``loss``), then what the terms
      measure: accuracy, skill, constant_predictor_loss, counts, over all rows since the last log.
    * Scheduled weights follow ``state.global_step``, also after a resume.
    * Own parameters are in a sidecar of each checkpoint (`Handle.save`). Resuming without it, or
      with that of another spec, is an error.
    * Evaluation and prediction see the plain model.

    Provides data parallelism (one process, DDP). Tensor, context and sequence parallelism, FSDP and
    DeepSpeed through the Trainer are refused.

    Args:
        objective: the spec, in any spelling; it is attached to ``self.model`` after the trainer's
            own ``__init__``, thus after PEFT and TRL. None: the model is attached
            already.
        label_layout: of ``shift_labels`` that the data collator makes, as in `attach`, whose word
            it is where the model was attached before. Those that the trainer itself makes from the labels
            of a batch are "stream": they count what the labels count.
        *args, **kwargs: of the Trainer.

    Attributes:
        nitp: the handle of the attached objective.

    Raises:
        ValueError: options that compute another loss (``label_smoothing_factor``,
            ``compute_loss_func``, ``use_liger_kernel`` with its fused loss), several GPUs in one
            process; a model without an objective. At the first step: an own parameter that the
            optimizer lacks.
        NotImplementedError: a parallelism that is not provided.
    """

    # Trainer.training_step divides by the microbatches of the window, see count_window
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *args: Any,
        objective: SpecLike | None = None,
        label_layout: LabelLayout = "document",
        **kwargs: Any,
    ) -> None:
        self._objective: SpecLike | None = None
        self._label_layout: LabelLayout = label_layout
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            smoothing = self.args.label_smoothing_factor
            raise ValueError(
                f"{type(self).__name__}: label_smoothing_factor is {smoothing}, expected 0: write "
                f'"ntp(label_smoothing={smoothing})"'
            )
        if self.compute_loss_func is not None:
            raise ValueError(
                f"{type(self).__name__}: compute_loss_func is given, expected None: the objective "
                "is the loss"
            )
        if self.args.use_liger_kernel and (self.args.liger_kernel_config or {}).get(
            "fused_linear_cross_entropy", True
        ):
            raise ValueError(
                f"{type(self).__name__}: use_liger_kernel is True, expected it with "
                'liger_kernel_config={"fused_linear_cross_entropy": False}: the objective is the '
                "loss"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{type(self).__name__}: {self.args.n_gpu} GPUs in one process, expected one a "
                "process (torchrun)"
            )
        data_parallel_only(self.accelerator, type(self).__name__)
        self._objective = objective
        assert isinstance(self.model, nn.Module)
        self._bind(self.model)

    def _bind(self, model: nn.Module) -> None:
        if self._objective is None:
            self.nitp: Handle = handle_of(model)
            self._label_layout = self.nitp.label_layout
        else:
            self.nitp = attach(model, self._objective, label_layout=self._label_layout)
        self._begin()

    def _begin(self) -> None:
        """What a run starts with, also where it starts again with a smaller batch."""
        self._step_log, self._optimizer_checked = StepLog(self.nitp.objective.spec), False
        self._counts: Counts | None = None
        self._window_step = 0

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        self._begin()
        try:
            return super()._inner_training_loop(batch_size, *args, **kwargs)
        finally:
            self._counts = None

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        # else __init__ does it, after the trainer's own changes to the model
        if hasattr(self, "nitp"):
            self._bind(model)
        return model

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: Any
    ) -> tuple[list[Any], Any]:
        self._end_window()
        # Trainer takes no step for it: it was short, or a callback ended the epoch in it
        if self._step_log.drop():
            self.model.zero_grad()  # type: ignore[reportOptionalMemberAccess]
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self.nitp.label_layout = self._label_layout
            self._collated_shift_labels = any(
                batch.get("shift_labels") is not None for batch in batches
            )
            counted = map(self.nitp.count, batches)
            self._counts = count_window(counted, divisor=len(batches), device=device)
            self._window_step = self.state.global_step
        return batches, num_items

    def _end_window(self) -> None:
        if self.state.global_step > self._window_step:
            self._step_log.step()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self._optimizer_checked:
            self.nitp.check(self.optimizer)  # type: ignore[reportArgumentType]
            self._optimizer_checked = True
        self.nitp.set_step(self.state.global_step)
        if inputs.get("shift_labels") is not None and not self._collated_shift_labels:
            # the trainer made them from the labels that were counted
            self.nitp.label_layout = "stream"
        self.nitp.set_counts(self._counts)
        try:
            outputs = model(**inputs)
        finally:
            self.nitp.set_counts(None)
        if self._counts is not None:
            self._step_log.add(self.nitp.metrics, self._counts)  # type: ignore[reportArgumentType]
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._end_window()
            logs |= {name: value for name, value in self._step_log.take().items() if name != "loss"}
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # first, so that what follows in the same folder (push, rotation, trainer_state.json) finds
        # it there
        folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.nitp.save(os.path.join(self._get_output_dir(trial=trial), folder))
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self.nitp.load(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.nitp.load(str(self.state.best_model_checkpoint))


class ObjectiveTrainer(ObjectiveTrainerMixin, transformers.Trainer):
    """`transformers.Trainer` with an objective: see `ObjectiveTrainerMixin`.

    Example:
        >>> trainer = ObjectiveTrainer(model=model, args=args, objective="ntp + 0.8*nitp")  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """
