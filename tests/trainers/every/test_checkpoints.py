"""Checkpoints of the Hugging Face Trainer: exact to the bit, and nothing of the objective in the
exported model."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from tests.support.trainer_cases import SPEC, padded, ragged_rows, tiny_llama, trainer_arguments

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nitp_ops.attaching import sidecar
from nitp_ops.trainers.transformers import ObjectiveTrainer

pytestmark = pytest.mark.trainers


def make_trainer(folder, spec=SPEC, **options) -> Any:
    options = {
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        **options,
    }
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
        **options,
    }
    arguments = trainer_arguments(folder, **options)
    given = {
        "train_dataset": ragged_rows(),
        "data_collator": padded,
        "eval_dataset": ragged_rows(4, seed=5),
    }
    return ObjectiveTrainer(
        model=tiny_llama(torch.float32), args=arguments, objective=spec, **given
    )


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def history(trainer):
    """The log without times."""
    return [
        {
            name: value
            for name, value in entry.items()
            if not name.startswith(("train_", "total_", "eval_"))
        }
        for entry in trainer.state.log_history
    ]


def test_training_resumes_to_the_bit(tmp_path):
    straight = make_trainer(tmp_path)
    straight.train()
    assert straight.state.global_step == 4
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = parameters(straight)
    assert any("nitp_objective" in name for name in expected)
    for name, parameter in parameters(resumed).items():
        assert torch.equal(parameter, expected[name]), name
    assert history(resumed) == history(straight)


def test_a_checkpoint_without_the_sidecar_or_of_another_spec_is_refused(tmp_path):
    make_trainer(tmp_path).train()
    folder = tmp_path / "checkpoint-2"
    with pytest.raises(ValueError, match="has the spec"):
        make_trainer(tmp_path, "ntp + 0.5*nitp(target_layer=1)").train(
            resume_from_checkpoint=str(folder)
        )
    (folder / sidecar.FILE).unlink()
    with pytest.raises(FileNotFoundError, match=sidecar.FILE):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(folder))


def test_the_best_model_comes_with_its_own_parameters(tmp_path):
    best = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "eval_loss",
    }
    trainer = make_trainer(tmp_path, greater_is_better=True, learning_rate=0.1, **best)
    trainer.train()
    kept = load_file(f"{trainer.state.best_model_checkpoint}/{sidecar.FILE}")
    own = dict(trainer.nitp.objective.named_parameters())
    assert own.keys() == kept.keys() and all(torch.equal(p, kept[name]) for name, p in own.items())


def test_the_exported_model_is_the_plain_one(tmp_path, caplog):
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "export"))
    caplog.set_level(logging.WARNING)
    load: Any = AutoModelForCausalLM.from_pretrained
    loaded, report = load(tmp_path / "export", output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]
    trained = parameters(trainer)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, trained[name]), name


def test_evaluation_and_generation_are_those_of_the_plain_model_to_the_bit(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="no")
    trainer.train()
    model, plain = trainer.model.eval(), tiny_llama(torch.float32).eval()
    plain.load_state_dict(model.state_dict())
    batch = padded(ragged_rows(4))
    for labels in (batch["labels"], None):
        found, expected = (each(**{**batch, "labels": labels}) for each in (model, plain))
        assert torch.equal(found.logits, expected.logits)
        assert labels is None or torch.equal(found.loss, expected.loss)
    prompt = batch["input_ids"][:1, :3]
    texts = [
        each.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
        for each in (model, plain)
    ]
    assert torch.equal(*texts)
