"""The Hugging Face Trainer: its steps are those of the formula, however the batch is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import nitp_ops
from tests.support.trainer_cases import (
    SPEC,
    WEIGHT,
    ByHand,
    padded,
    ragged_rows,
    tiny_llama,
    trainer_arguments,
)

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import DataCollatorWithFlattening, Trainer

from nitp_ops.trainers.transformers import ObjectiveTrainer, ObjectiveTrainerMixin

pytestmark = pytest.mark.trainers
RATE = 0.5


def make_trainer(
    folder: Path, cls: Any = ObjectiveTrainer, *, objective: Any = SPEC, **options: Any
) -> Any:
    """A trainer of a new tiny Llama on eight ragged rows, and the same model by hand."""
    model, given = tiny_llama(), options.pop("given", {})
    collator = options.pop("data_collator", padded)
    given |= {
        "train_dataset": ragged_rows(),
        "data_collator": collator,
        "args": trainer_arguments(folder, **options),
    }
    if objective is not None and issubclass(cls, ObjectiveTrainerMixin):
        trainer = cls(model=model, objective=objective, **given)
        return trainer, ByHand(tiny_llama(), model.nitp_objective)
    handle = nitp_ops.attach(model, objective or SPEC)
    return cls(model=model, **given), ByHand(tiny_llama(), handle.objective)


def logged(trainer: Trainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("size, accumulated", [(8, 1), (4, 2), (3, 3)])
def test_every_cut_of_the_batch_takes_the_steps_of_the_formula(tmp_path, size, accumulated):
    trainer, by_hand = make_trainer(
        tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated
    )
    trainer.train()
    for entry in logged(trainer):
        loss = by_hand.loss([padded(ragged_rows())])
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-6)
        by_hand.step(loss, RATE)
    by_hand.check(trainer.model)


def test_a_model_that_takes_no_loss_arguments_is_scaled_alike(tmp_path):
    trainer, by_hand = make_trainer(
        tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    trainer.model_accepts_loss_kwargs = False  # Trainer would then divide by the accumulation steps
    trainer.train()
    for _ in logged(trainer):
        by_hand.step(by_hand.loss([padded(ragged_rows())]), RATE)
    by_hand.check(trainer.model)


def test_the_contributions_add_up_to_the_logged_loss_also_over_several_steps(tmp_path):
    options = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 4,
    }
    trainer, by_hand = make_trainer(tmp_path, logging_steps=2, **options)
    trainer.train()
    batch = padded(ragged_rows())
    for entry in logged(trainer):
        parts = {"ntp": 0.0, "nitp": 0.0}
        for _ in range(2):
            found = {term: total / count for term, (total, count) in by_hand.sums(batch).items()}
            parts = {
                "ntp": parts["ntp"] + found["ntp"].item() / 2,
                "nitp": parts["nitp"] + WEIGHT * found["nitp"].item() / 2,
            }
            by_hand.step(found["ntp"] + WEIGHT * found["nitp"], RATE)
        assert entry["loss/ntp"] == pytest.approx(parts["ntp"], rel=1e-9)
        assert entry["loss/nitp"] == pytest.approx(parts["nitp"], rel=1e-9)
        assert entry["loss/ntp"] + entry["loss/nitp"] == pytest.approx(entry["loss"], rel=1e-6)
        assert (
            entry["ntp/count"] == 2 * by_hand.sums(batch)["ntp"][1]
            and 0 <= entry["ntp/accuracy"] <= 1
        )
        assert {"nitp/skill", "nitp/constant_predictor_loss", "nitp/count"} <= entry.keys()


def test_the_stock_trainer_weighs_local_means_by_their_share_of_the_tokens(tmp_path):
    trainer, by_hand = make_trainer(
        tmp_path,
        Trainer,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    rows = ragged_rows()
    halves = [padded(rows[:4]), padded(rows[4:])]
    for entry in logged(trainer):
        found = [by_hand.sums(half) for half in halves]
        items = sum(f["ntp"][1] for f in found)
        loss: Any = sum(
            f["ntp"][0] / items + WEIGHT * f["nitp"][0] / f["nitp"][1] * f["ntp"][1] / items
            for f in found
        )
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-6)
        by_hand.step(loss, RATE)
    by_hand.check(trainer.model)


def test_packed_rows_train_like_rows_apart(tmp_path):
    trainer, by_hand = make_trainer(
        tmp_path,
        data_collator=DataCollatorWithFlattening(),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        remove_unused_columns=False,
    )
    trainer.train()
    for _ in logged(trainer):
        by_hand.step(by_hand.loss([padded(ragged_rows())]), RATE)
    by_hand.check(trainer.model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, reentrant):
    trainer, by_hand = make_trainer(
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    trainer.train()
    for _ in logged(trainer):
        by_hand.step(by_hand.loss([padded(ragged_rows())]), RATE)
    by_hand.check(trainer.model)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_scheduled_weight_takes_effect_at_its_global_step(tmp_path, resumed):
    spec = {"ntp": {}, "nitp": {"weight": [[0, 0.0], [2, 0.5], [3, 0.25]], "target_layer": 1}}
    options = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 4,
    }
    trainer, by_hand = make_trainer(
        tmp_path, objective=spec, save_strategy="steps", save_steps=3, **options
    )
    trainer.train()
    entries = logged(trainer)
    if resumed:
        again, _ = make_trainer(tmp_path, objective=spec, **options)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        entries = logged(again)
        assert len(entries) == 4  # three from the checkpoint's history
        trainer = again
    for entry, weight in zip(entries, (0.0, 0.0, 0.5, 0.25), strict=True):
        assert entry["loss/nitp"] == pytest.approx(weight * entry["nitp/loss"], rel=1e-12, abs=0)
        by_hand.step(by_hand.loss([padded(ragged_rows())], {"ntp": 1.0, "nitp": weight}), RATE)
    by_hand.check(trainer.model)


def test_evaluation_shows_the_loss_of_the_plain_model(tmp_path):
    rows = ragged_rows()
    trainer, by_hand = make_trainer(
        tmp_path, given={"eval_dataset": rows}, eval_strategy="steps", eval_steps=1
    )
    plain = Trainer(
        model=tiny_llama(),
        args=trainer_arguments(tmp_path),
        data_collator=padded,
        eval_dataset=rows,
        train_dataset=rows,
    )
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    trainer.train()
    with torch.no_grad():
        by_hand.plain.load_state_dict(trainer.model.state_dict())
        expected = by_hand.plain(**padded(rows)).loss.item()
    assert trainer.state.log_history[-2]["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_a_parameter_that_no_optimizer_holds_stops_before_step_zero(tmp_path):
    model = tiny_llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = ObjectiveTrainer(
        model=model,
        args=trainer_arguments(tmp_path),
        train_dataset=ragged_rows(),
        data_collator=padded,
        objective=SPEC,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)),
    )
    with pytest.raises(ValueError, match="optimizer"):
        trainer.train()
    assert all(
        torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before
    )


@pytest.mark.parametrize(
    "given, options, named",
    [
        ({}, {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"compute_loss_func": lambda *_, **__: 0}, {}, "compute_loss_func"),
    ],
)
def test_another_loss_is_refused(tmp_path, given, options, named):
    with pytest.raises(ValueError, match=named):
        make_trainer(tmp_path, given=given, **options)


def test_a_model_without_an_objective_is_refused(tmp_path):
    with pytest.raises(ValueError, match="objective"):
        ObjectiveTrainer(
            model=tiny_llama(), args=trainer_arguments(tmp_path), train_dataset=ragged_rows()
        )
