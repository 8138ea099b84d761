"""Axolotl's trainer with an objective; the plugin hands it to Axolotl."""

from __future__ import annotations

from axolotl.core.trainers.base import AxolotlTrainer

from .transformers import ObjectiveTrainerMixin


class ObjectiveAxolotlTrainer(ObjectiveTrainerMixin, AxolotlTrainer):
    """`AxolotlTrainer`, whose model has an objective: see `ObjectiveTrainerMixin`."""
