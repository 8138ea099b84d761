"""Axolotl: a plugin, for supervised and completion training.

    plugins:
      - nitp_ops.trainers.axolotl.ObjectivePlugin
    nitp_objective: ntp + 0.8*nitp(target_layer=0.2)

The objective is attached to the loaded model, after its adapters; Axolotl's own trainer then counts
whole accumulation windows, logs the parts of the loss and keeps the own parameters in its
checkpoints, as `ObjectiveTrainer` does.
"""

from __future__ import annotations

from typing import Any, Literal

from .requirements import check_version

check_version("axolotl", "0.19", "0.20")

from axolotl.integrations.base import BasePlugin  # noqa: E402
from pydantic import BaseModel, field_validator, model_validator  # noqa: E402

from nitp_ops.attaching.api import attach  # noqa: E402
from nitp_ops.objectives import parse  # noqa: E402

# options that replace the objective by another loss, or another forward
_OTHER_LOSS = (
    "cut_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "liger_cross_entropy",
    "chunked_cross_entropy",
)
_OTHER_TRAINER = ("rl", "reward_model", "process_reward_model", "trainer_cls")


class ObjectiveArgs(BaseModel):
    """What the plugin adds to Axolotl's config.

    nitp_objective: a spec as an expression or a mapping, see `nitp_ops.objectives.parse`.
        nitp_seed: of its parameters.
    nitp_label_layout: of ``shift_labels`` that the data brings, see `attach`.
    """

    nitp_objective: str | dict[str, Any]
    nitp_seed: int = 0
    nitp_label_layout: Literal["document", "stream"] = "document"

    @field_validator("nitp_objective")
    @classmethod
    def check_spec(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        parse(value)
        return value

    @model_validator(mode="before")
    @classmethod
    def check_others(cls, data: Any) -> Any:
        found = [name for name in (*_OTHER_LOSS, *_OTHER_TRAINER) if data.get(name)]
        if found:
            got = ", ".join(f"{name} is {data[name]!r}" for name in found)
            raise ValueError(
                f"axolotl: {got}, expected none of them with nitp_objective (the objective is the "
                "loss)"
            )
        return data


class ObjectivePlugin(BasePlugin):
    """Gives the model that Axolotl loads the objective of ``nitp_objective``, and its trainer the
    counts of windows."""

    def get_input_args(self) -> str:
        return f"{ObjectiveArgs.__module__}.{ObjectiveArgs.__name__}"

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Attach, after adapters and Axolotl's own patches."""
        layout = cfg["nitp_label_layout"] or "document"
        attach(
            model, _plain(cfg["nitp_objective"]), seed=cfg["nitp_seed"] or 0, label_layout=layout
        )

    def get_trainer_cls(self, cfg: Any) -> type:
        """AxolotlTrainer with an objective; the model that it gets has one."""
        # Axolotl's trainers cost seconds to import
        from .axolotl_trainer import ObjectiveAxolotlTrainer

        return ObjectiveAxolotlTrainer


def _plain(spec: Any) -> Any:
    """Axolotl hands out dictionaries that answer None to any name."""
    return {key: _plain(value) for key, value in spec.items()} if isinstance(spec, dict) else spec
