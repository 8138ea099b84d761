"""Windows under Lightning: none is counted past the batches that are trained on, none outlives its
fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

pytest.importorskip("lightning")
pytest.importorskip("transformers")

import lightning as L
from lightning.pytorch.utilities import CombinedLoader

from nitp_ops.objectives import Streams
from nitp_ops.trainers.lightning import ObjectiveCallback
from tests.trainers.cases.lightning import (
    QUIET,
    SPEC,
    OwnStreams,
    Wrapped,
    by_hand,
    fit,
    llama,
    rows,
    tokens,
)

pytestmark = [pytest.mark.trainers, pytest.mark.filterwarnings("ignore")]


class Stream(IterableDataset):
    """Rows without a length."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


class Watch(L.Callback):
    """What is logged at the end of every window."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        self.seen.append({name: value.item() for name, value in trainer.logged_metrics.items()})


def check(module: Any, windows: list[Any]) -> None:
    for name, value in by_hand(windows).items():
        torch.testing.assert_close(
            module.model.get_parameter(name),
            value,
            rtol=1e-9,
            atol=1e-12,
            msg=lambda text, n=name: f"{n}: {text}",
        )


@pytest.mark.parametrize(
    "options",
    [
        {"limit_train_batches": 0.5},
        {"limit_train_batches": 5, "data": Stream},
        {"overfit_batches": 5},
        {"limit_train_batches": 5, "val_check_interval": 3},
        {"limit_train_batches": 5, "max_steps": 3, "max_epochs": -1},
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()),
)
def test_the_last_window_of_an_epoch_is_what_it_trains_on(options):
    data = rows(20)
    # batches of two rows, windows of four batches, five batches an epoch
    windows = [data[:8], data[8:10]]
    module = Wrapped(llama())
    loader = DataLoader(options.pop("data", list)(data), batch_size=2)
    validation = DataLoader(data, batch_size=2) if "val_check_interval" in options else None
    options = {
        "max_epochs": 2,
        "accumulate_grad_batches": 4,
        "enable_checkpointing": False,
        **QUIET,
        **options,
    }
    watch = Watch()
    trainer = L.Trainer(callbacks=[ObjectiveCallback(SPEC), watch], **options)
    trainer.fit(module, loader, validation)
    windows = (windows * 2)[: 3 if "max_steps" in options else 4]
    assert trainer.global_step == len(windows)
    check(module, windows)
    labels = sum((row["labels"][1:] != -100).sum().item() for row in windows[-1])
    assert watch.seen[-1]["objective/ntp/count"] == labels


class Joined(OwnStreams):
    """A batch is a list of batches, one of each loader."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        return super().training_step(joined(batch), index)


def joined(batch: Any) -> dict[str, Tensor]:
    parts = batch if isinstance(batch, list) else [batch]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_several_loaders_end_where_the_trainer_ends_them():
    data = rows(12)
    whole, module = Joined(), Joined()
    options: dict[str, Any] = {"max_epochs": 1, "enable_checkpointing": False, **QUIET}
    limits: dict[str, Any] = {"accumulate_grad_batches": 4, "limit_train_batches": 2}
    callbacks: Any = [
        ObjectiveCallback(streams=lambda batch: Streams(**tokens(joined(batch)))) for _ in range(2)
    ]
    trainer = L.Trainer(callbacks=callbacks[:1], **options, **limits)
    trainer.fit(
        module,
        CombinedLoader(
            [DataLoader(part, batch_size=2) for part in (data[:6], data[6:])], "min_size"
        ),
    )
    combined = DataLoader(data[:4] + data[6:10], batch_size=8)
    L.Trainer(callbacks=callbacks[1:], **options).fit(whole, combined)
    assert trainer.global_step == 1
    for (name, mine), theirs in zip(module.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(
            mine, theirs, rtol=1e-10, atol=1e-13, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_a_callback_serves_one_fit_after_another():
    callback, first, second = ObjectiveCallback(SPEC), Wrapped(llama()), Wrapped(llama())
    for module in (first, second):
        fit(module, rows(), callback, accumulate_grad_batches=4)
        check(module, [rows()])
    fit(first, rows(), callback, accumulate_grad_batches=4)
    check(first, [rows()] * 2)
    fit(second, rows(), ObjectiveCallback(SPEC), accumulate_grad_batches=4)  # of another trainer
    check(second, [rows()] * 2)
    with pytest.raises(ValueError, match=r"the model has the objective .*ntp.*, expected"):
        fit(second, rows(), ObjectiveCallback("ntp"))


class Stops(L.Callback):
    """An error inside a window."""

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            raise RuntimeError("stopped")


def test_a_pass_after_a_fit_counts_itself_and_an_error_leaves_nothing_behind():
    batch: dict[str, Tensor] = {
        name: torch.stack([row[name] for row in rows(4)]) for name in rows(4)[0]
    }
    callback, module = ObjectiveCallback(SPEC), Wrapped(llama())
    trainer = L.Trainer(
        callbacks=[callback, Stops()],
        max_epochs=1,
        enable_checkpointing=False,
        accumulate_grad_batches=4,
        **QUIET,
    )
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.fit(module, DataLoader(rows(), batch_size=2))
    fresh = Wrapped(llama())
    fit(fresh, rows(), ObjectiveCallback(SPEC), max_steps=0)
    torch.testing.assert_close(
        module.model.train()(**batch).loss, fresh.model.train()(**batch).loss
    )
    fit(module, rows(), callback, accumulate_grad_batches=4)
    check(module, [rows()])
    loss = module.model.train()(**batch).loss
    fit(fresh, rows(), ObjectiveCallback(SPEC), accumulate_grad_batches=4)
    torch.testing.assert_close(loss, fresh.model.train()(**batch).loss)


def test_a_window_without_any_label_is_no_ntp():
    data: Any = [row | {"labels": torch.full_like(row["labels"], -100)} for row in rows()]
    module, watch = Wrapped(llama()), Watch()
    trainer = L.Trainer(
        callbacks=[ObjectiveCallback("ntp"), watch],
        max_epochs=1,
        accumulate_grad_batches=4,
        enable_checkpointing=False,
        **QUIET,
    )
    trainer.fit(module, DataLoader(data, batch_size=2))
    assert watch.seen[-1]["objective/loss"] == 0 and watch.seen[-1]["objective/ntp/count"] == 0
    for name, value in llama().named_parameters():
        assert torch.equal(module.model.get_parameter(name), value), name
