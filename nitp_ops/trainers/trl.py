"""TRL's SFTTrainer with objectives, packed rows included.

    trainer = ObjectiveSFTTrainer(
        model=model, args=SFTConfig(packing=True), train_dataset=data, objective="ntp + 0.8*nitp"
    )

SFTTrainer builds a fused head of its own into the model in its ``__init__`` and computes its loss
from that head's outputs. In training the objective takes the place of both; evaluation stays TRL's
own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from trl import SFTConfig, SFTTrainer  # type: ignore[reportPrivateImportUsage]

from .transformers import ObjectiveTrainerMixin


class ObjectiveSFTTrainer(ObjectiveTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` with an objective: see `ObjectiveTrainerMixin`.

    The objective is attached after SFTTrainer's ``__init__``, which applies PEFT and installs its
    head. In training ``ntp/accuracy`` takes the place of TRL's ``mean_token_accuracy`` in the log,
    ``num_tokens`` stays, and there is no ``entropy``: no term measures it.

    Raises:
        ValueError: ``loss_type`` is not "nll" (another loss); and what `ObjectiveTrainerMixin` raises.

    Example:
        >>> trainer = ObjectiveSFTTrainer(model=model, train_dataset=data, objective="ntp + 0.8*nitp")  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self.args, SFTConfig)
        if self.args.loss_type != "nll":
            raise ValueError(
                f'ObjectiveSFTTrainer: loss_type is "{self.args.loss_type}", expected "nll": the '
                "objective is the loss"
            )
        self._tokens: Tensor | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if model.training:
            inputs["use_cache"] = False
            if self.aux_loss_enabled:
                inputs["output_router_logits"] = True
            mask = inputs.get("attention_mask")
            seen = torch.as_tensor(
                inputs["input_ids"].numel() if mask is None else mask.sum(), device=self.args.device
            )
            self._tokens = seen if self._tokens is None else self._tokens + seen
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._tokens is not None:
            self._total_train_tokens += int(self.accelerator.reduce(self._tokens, "sum"))  # type: ignore[reportArgumentType]
            self._tokens = None
            logs["num_tokens"] = self._total_train_tokens
        super().log(logs, start_time)
