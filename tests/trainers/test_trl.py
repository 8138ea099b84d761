"""TRL's SFTTrainer: padded and packed rows take the steps of the formula, and its own head is out
of the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nitp_ops
from tests.support.trainer_cases import (
    SPEC,
    ByHand,
    padded,
    ragged_rows,
    tiny_llama,
    trainer_arguments,
)

pytest.importorskip("trl")
pytest.importorskip("datasets")
from datasets import Dataset
from transformers import ByT5Tokenizer
from trl import SFTConfig, SFTTrainer  # type: ignore[reportPrivateImportUsage]

from nitp_ops.trainers.trl import ObjectiveSFTTrainer

pytestmark = pytest.mark.trainers
RATE = 0.5


def make_trainer(folder, cls: Any = ObjectiveSFTTrainer, *, given: Any = None, **options) -> Any:
    options = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_length": 64,
        **options,
    }
    options = {"gradient_checkpointing": False, "bf16": False, **options}
    arguments = trainer_arguments(folder, SFTConfig, **options)
    rows = Dataset.from_list(ragged_rows())
    given = {"processing_class": ByT5Tokenizer(), "train_dataset": rows, **(given or {})}
    if issubclass(cls, ObjectiveSFTTrainer):
        given.setdefault("objective", SPEC)
    return cls(model=given.pop("model", None) or tiny_llama(), args=arguments, **given)


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("packing", [False, True])
def test_padded_and_packed_rows_take_the_steps_of_the_formula(tmp_path, packing):
    # packed into rows of 16 the batch has other rows, but the same tokens in the same documents
    lengths = (
        {"packing": True, "max_length": 16, "per_device_train_batch_size": 8} if packing else {}
    )
    trainer = make_trainer(tmp_path, **lengths)
    by_hand = ByHand(tiny_llama(), trainer.nitp.objective)
    trainer.train()
    assert len(logged(trainer)) == 2
    # TRL drops the row without labels where it does not pack
    rows = ragged_rows() if packing else ragged_rows()[:-1]
    for entry in logged(trainer):
        loss = by_hand.loss([padded(rows)])
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert entry["loss/ntp"] + entry["loss/nitp"] == pytest.approx(entry["loss"], rel=1e-6)
        by_hand.step(loss, RATE)
    by_hand.check(trainer.model)


def test_ntp_alone_trains_and_logs_like_trl(tmp_path):
    theirs, ours = (
        make_trainer(tmp_path, SFTTrainer),
        make_trainer(tmp_path, given={"objective": "ntp"}),
    )
    for trainer in (theirs, ours):
        trainer.train()
    for expected, entry in zip(logged(theirs), logged(ours), strict=True):
        for name in ("loss", "grad_norm", "num_tokens", "epoch", "learning_rate"):
            assert entry[name] == pytest.approx(expected[name], rel=1e-6), name
    expected = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-6, atol=1e-8)


def test_evaluation_is_that_of_trl(tmp_path):
    rows = Dataset.from_list(ragged_rows(4, seed=5))
    found, expected = (
        make_trainer(tmp_path, cls, given={"eval_dataset": rows}).evaluate()
        for cls in (ObjectiveSFTTrainer, SFTTrainer)
    )
    assert found["eval_loss"] == expected["eval_loss"]
    assert found["eval_entropy"] == expected["eval_entropy"]


def test_attached_before_trl_is_refused_at_the_first_step(tmp_path):
    model = tiny_llama()
    nitp_ops.attach(model, SPEC)
    with pytest.raises(RuntimeError, match="attach after"):
        make_trainer(tmp_path, SFTTrainer, given={"model": model}).train()


def test_the_stock_trainer_is_refused_by_name(tmp_path):
    trainer = make_trainer(tmp_path, SFTTrainer)
    nitp_ops.attach(trainer.model, SPEC)
    with pytest.raises(ValueError, match="fused_lm_head"):
        trainer.train()


@pytest.mark.parametrize("option", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_another_loss_is_refused(tmp_path, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        make_trainer(tmp_path, **option)


def test_lora_trains_its_adapter_and_the_projector(tmp_path):
    import peft

    adapter = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(
        tmp_path, given={"peft_config": adapter, "model": tiny_llama(torch.float32)}
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {
        name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])
    }
    own = {name for name in before if "nitp_objective" in name}
    adapters = {name for name in before if "lora_B" in name}
    assert own and adapters and own | adapters <= changed
    assert all("lora_" in name or "nitp_objective" in name for name in changed)
