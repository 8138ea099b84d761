"""The Axolotl plugin, registered by Axolotl's own manager, with its config schema and its trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("axolotl.integrations.base")
pytest.importorskip("nitp_ops.trainers.axolotl", exc_type=ImportError)

from dataclasses import dataclass

import datasets
import transformers
from axolotl.core.training_args_base import AxolotlTrainingMixins
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.integrations.config import merge_input_args
from axolotl.utils.dict import DictDefault
from pydantic import ValidationError

from nitp_ops.trainers.axolotl import ObjectiveArgs, ObjectivePlugin
from nitp_ops.trainers.transformers import ObjectiveTrainer

pytestmark = [pytest.mark.trainers, pytest.mark.filterwarnings("ignore")]
NAME = "nitp_ops.trainers.axolotl.ObjectivePlugin"
SPEC = {"ntp": {}, "nitp": {"weight": 0.8, "target_layer": 1}}


@dataclass
class Arguments(AxolotlTrainingMixins, transformers.TrainingArguments):
    """What axolotl.core.training_args makes of the two, without its imports of experimental parts
    of TRL."""


@pytest.fixture
def manager(monkeypatch) -> PluginManager:
    monkeypatch.setattr(PluginManager, "_instance", None)
    manager = PluginManager.get_instance()
    manager.register(NAME)
    return manager


def llama() -> Any:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))


def rows() -> list[dict[str, list[int]]]:
    """Two documents a row, as sample packing makes them, of other lengths and with other labels in
    every row."""
    found = []
    for row in range(12):
        draw = torch.Generator().manual_seed(row)
        ids = torch.randint(32, (10,), generator=draw)
        cut = 3 + row % 5
        labels = ids.masked_fill(torch.rand(10, generator=draw) < 0.1 * row / 2, -100)
        positions = [*range(cut), *range(10 - cut)]
        found.append(
            {"input_ids": ids.tolist(), "labels": labels.tolist(), "position_ids": positions}
        )
    return found


def train(
    trainer_class: Any, arguments_class: Any, model: Any, folder: Path, **options: Any
) -> dict[str, Any]:
    arguments = arguments_class(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        logging_steps=1,
        save_steps=3,
        use_cpu=True,
        seed=5,
        report_to=[],
    )
    data = datasets.Dataset.from_list(rows())
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=transformers.default_data_collator,
        **options,
    )
    trainer.train()
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"parameters": parameters, "log": trainer.state.log_history, "trainer": trainer}


def test_the_plugin_joins_axolotls_manager_and_config(manager):
    (plugin,) = manager.plugins.values()
    assert isinstance(plugin, ObjectivePlugin) and isinstance(plugin, BasePlugin)
    for config in merge_input_args():
        assert issubclass(config, ObjectiveArgs)
        assert {
            "nitp_objective",
            "nitp_seed",
            "base_model",
            "sample_packing",
        } <= config.model_fields.keys()


def test_its_trainer_trains_as_the_one_that_is_proven_against_the_formula(manager, tmp_path):
    cfg, model, plain = DictDefault(nitp_objective=SPEC, nitp_seed=0), llama(), llama()
    manager.post_model_load(cfg, model)
    trainer_class = manager.get_trainer_cls(cfg)
    mine = train(trainer_class, Arguments, model, tmp_path / "axolotl")
    expected = train(
        ObjectiveTrainer, transformers.TrainingArguments, plain, tmp_path / "plain", objective=SPEC
    )
    assert mine["parameters"].keys() == expected["parameters"].keys()
    for name, value in expected["parameters"].items():
        assert torch.equal(mine["parameters"][name], value), name
    for step in range(3):
        row = mine["log"][step]
        assert row["loss/ntp"] + row["loss/nitp"] == pytest.approx(
            expected["log"][step]["loss"], rel=1e-4
        )
    assert (tmp_path / "axolotl/checkpoint-3/nitp_objective.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nitp_objective": "ntp + 0.8*nitpp"}, 'Did you mean "nitp"'),
        (
            {"nitp_objective": "ntp", "cut_cross_entropy": True},
            "cut_cross_entropy is True, expected none",
        ),
        (
            {"nitp_objective": "ntp", "liger_fused_linear_cross_entropy": True},
            "liger_fused_linear_cross_entropy is",
        ),
        ({"nitp_objective": "ntp", "rl": "dpo"}, "rl is 'dpo', expected none"),
        ({}, "nitp_objective"),
    ],
)
def test_a_config_that_can_not_work_is_refused_before_a_model_is_loaded(options, message):
    with pytest.raises(ValidationError, match=message):
        ObjectiveArgs(**options)
