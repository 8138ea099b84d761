"""What a run or a window of the Hugging Face Trainer leaves behind: nothing that the next one would
count."""

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

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from nitp_ops.trainers.transformers import ObjectiveTrainer

pytestmark = [pytest.mark.trainers, pytest.mark.filterwarnings("ignore")]
RATE = 0.5


def make_trainer(folder: Any, rows: Any = None, **options: Any) -> Any:
    given = {name: options.pop(name) for name in ("callbacks", "model_init") if name in options}
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2} | options
    options = {"train_sampling_strategy": "sequential"} | options
    model = None if "model_init" in given else tiny_llama()
    return ObjectiveTrainer(
        model=model,
        args=trainer_arguments(folder, **options),
        train_dataset=ragged_rows() if rows is None else rows,
        data_collator=padded,
        objective=SPEC,
        **given,
    )


def logged(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def check_log(trainer: Any, by_hand: ByHand, windows: list[Any]) -> None:
    """One entry a window: its loss, and parts that add up to it; `by_hand` takes the same steps."""
    entries = logged(trainer)
    assert len(entries) == len(windows)
    for entry, window in zip(entries, windows, strict=True):
        loss = by_hand.loss([padded(window)])
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert entry["loss/ntp"] + entry["loss/nitp"] == pytest.approx(loss.item(), rel=1e-9)
        by_hand.step(loss, RATE)


def test_a_second_run_of_one_trainer_logs_its_own_steps(tmp_path):
    trainer = make_trainer(tmp_path)
    by_hand = ByHand(tiny_llama(), trainer.nitp.objective)
    for _ in range(2):
        trainer.train()
        check_log(trainer, by_hand, [ragged_rows()] * 2)
    by_hand.check(trainer.model)


class OutOfMemory(TrainerCallback):
    """Once, after the first of two microbatches of the second step."""

    def __init__(self) -> None:
        self.fallen = False

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and not self.fallen:
            self.fallen = True
            raise RuntimeError("CUDA out of memory.")


def test_a_restart_with_a_smaller_batch_logs_and_trains_as_a_run_of_its_own(tmp_path):
    options: dict[str, Any] = {
        "auto_find_batch_size": True,
        "per_device_train_batch_size": 4,
        "logging_steps": 2,
    }
    trainer = make_trainer(tmp_path, callbacks=[OutOfMemory()], num_train_epochs=2, **options)
    start: dict[str, Any] = {}

    class AtStart(TrainerCallback):
        def on_train_begin(self, *rest: Any, model: Any = None, **kwargs: Any) -> None:
            start["by_hand"] = ByHand(tiny_llama(), trainer.nitp.objective)
            start["by_hand"].plain.load_state_dict(model.state_dict())

    trainer.add_callback(AtStart())
    trainer.train()
    size = trainer._train_batch_size
    assert size < 4
    rows, entries = ragged_rows(), logged(trainer)
    windows = [rows[at : at + 2 * size] for at in range(0, len(rows), 2 * size)] * 2
    losses = []
    for window in windows:
        loss = start["by_hand"].loss([padded(window)])
        start["by_hand"].step(loss, RATE)
        losses.append(loss.item())
    assert len(entries) == len(windows) // 2
    for index, entry in enumerate(entries):
        assert entry["loss/ntp"] + entry["loss/nitp"] == pytest.approx(
            sum(losses[2 * index :][:2]) / 2, rel=1e-9
        )
        assert entry["loss"] == pytest.approx(entry["loss/ntp"] + entry["loss/nitp"], rel=1e-6)
    start["by_hand"].check(trainer.model)


def test_after_training_and_after_an_error_a_pass_counts_itself(tmp_path):
    batch = padded(ragged_rows(4))
    for callbacks in ([], [OutOfMemory()]):
        trainer = make_trainer(tmp_path, callbacks=callbacks)
        if callbacks:
            with pytest.raises(RuntimeError, match="out of memory"):
                trainer.train()
        else:
            trainer.train()
        found = trainer.model.train()(**batch).loss
        by_hand = ByHand(tiny_llama(), trainer.nitp.objective)
        by_hand.plain.load_state_dict(trainer.model.state_dict())
        torch.testing.assert_close(found, by_hand.loss([batch]), rtol=1e-9, atol=0)


class Stream(IterableDataset):
    """Rows without a length."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_a_window_that_the_trainer_takes_no_step_for_does_not_join_the_next_one(tmp_path):
    # three microbatches of two rows an epoch: the Trainer steps after two of them and begins anew
    rows = ragged_rows()[:6]
    trainer = make_trainer(tmp_path, Stream(rows), per_device_train_batch_size=2, max_steps=3)
    by_hand = ByHand(tiny_llama(), trainer.nitp.objective)
    trainer.train()
    losses = []
    for _ in range(3):
        losses.append(by_hand.loss([padded(rows[:4])]))
        by_hand.step(losses[-1], RATE)
    for entry, loss in zip(logged(trainer), losses, strict=True):
        assert entry["loss/ntp"] + entry["loss/nitp"] == pytest.approx(loss.item(), rel=1e-9)
    by_hand.check(trainer.model)


def test_skipped_batches_of_a_resumed_epoch_are_not_counted(tmp_path):
    options: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "save_strategy": "steps",
    }
    rows = ragged_rows(10)  # windows of 4, 4 and 2 rows
    whole = make_trainer(tmp_path / "whole", rows, save_steps=2, **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", rows, save_steps=9, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert logged(resumed)[-1]["loss/ntp"] == pytest.approx(
        logged(whole)[-1]["loss/ntp"], rel=1e-12
    )
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), parameter), name


def unlabelled(count: int) -> Any:
    return [{**row, "labels": [-100] * len(row["labels"])} for row in ragged_rows(count)]


@pytest.mark.parametrize(
    ("spec", "steps"), [(SPEC, 1), (SPEC, 2), (f"{SPEC[:-1]}, denominator=main)", 2)]
)
def test_a_window_without_any_label_is_zero_under_the_stock_trainer(tmp_path, spec, steps):
    model = tiny_llama()
    nitp_ops.attach(model, spec)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = trainer_arguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=steps
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=unlabelled(4), data_collator=padded
    )
    trainer.train()
    assert all(entry["loss"] == 0 and entry["grad_norm"] == 0 for entry in logged(trainer))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_window_without_any_label_is_no_ntp_in_the_trainer_of_objectives(tmp_path):
    trainer = make_trainer(tmp_path, unlabelled(4), per_device_train_batch_size=2, max_steps=1)
    by_hand = ByHand(tiny_llama(), trainer.nitp.objective)
    trainer.train()
    (entry,) = logged(trainer)
    total, count = by_hand.sums(padded(unlabelled(4)))["nitp"]
    assert entry["loss/ntp"] == 0 and entry["ntp/count"] == 0 and entry["ntp/loss"] == 0
    assert entry["loss/nitp"] == pytest.approx(0.8 * total.item() / count.item(), rel=1e-9)
    by_hand.step(0.8 * total / count, RATE)
    by_hand.check(trainer.model)
