"""Two gloo ranks take the steps of one process: Hugging Face Trainer and Accelerate, ragged and
with unequal counts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

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

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
]
RANKS, RATE = 2, 0.5


@contextmanager
def launched(rank: int, folder: str) -> Iterator[None]:
    """What torchrun sets; the group itself is made by accelerate."""
    torch.set_num_threads(1)
    port = Path(folder, "port").read_text()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def on_two_ranks(worker: Callable[[int, str], None], folder: Path) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        Path(folder, "port").write_text(str(free.getsockname()[1]))
    spawn(worker, args=(str(folder),), nprocs=RANKS)


def trainer_of_objectives(rank: int, folder: str) -> None:
    from nitp_ops.trainers.transformers import ObjectiveTrainer

    with launched(rank, folder):
        arguments = trainer_arguments(
            folder,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_strategy="epoch",
        )
        trainer = ObjectiveTrainer(
            model=tiny_llama(),
            args=arguments,
            train_dataset=ragged_rows(),
            data_collator=padded,
            objective=SPEC,
        )
        assert trainer.args.world_size == RANKS
        by_hand = ByHand(tiny_llama(), trainer.nitp.objective)
        trainer.train()
        for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
            sums = by_hand.sums(padded(ragged_rows()))
            loss = by_hand.loss([padded(ragged_rows())])
            assert entry["loss"] == pytest.approx(loss.item(), rel=1e-6)
            assert entry["loss/ntp"] + entry["loss/nitp"] == pytest.approx(loss.item(), rel=1e-9)
            assert (entry["ntp/count"], entry["nitp/count"]) == (sums["ntp"][1], sums["nitp"][1])
            by_hand.step(loss, RATE)
        by_hand.check(trainer.model)

        from tests.trainers.every.test_balance import check_step, experts, one_step

        model = experts()
        check_step(model, 1, one_step(folder, ObjectiveTrainer, model, 1, 2, objective="ntp"))


def stock_trainer(rank: int, folder: str) -> None:
    from transformers import Trainer

    with launched(rank, folder):
        model, rows = tiny_llama(), ragged_rows()
        handle = nitp_ops.attach(model, SPEC)
        by_hand = ByHand(tiny_llama(), handle.objective)
        arguments = trainer_arguments(
            folder, per_device_train_batch_size=4, train_sampling_strategy="sequential"
        )
        Trainer(model=model, args=arguments, train_dataset=rows, data_collator=padded).train()
        shares = [padded(rows[:4]), padded(rows[4:])]
        for _ in range(2):
            found = [by_hand.sums(share) for share in shares]
            items = sum(f["ntp"][1] for f in found)
            by_hand.step(
                sum(
                    f["ntp"][0] / items + WEIGHT * f["nitp"][0] / f["nitp"][1] * f["ntp"][1] / items
                    for f in found
                ),
                RATE,
            )
        by_hand.check(model)


def accelerate_loop(rank: int, folder: str) -> None:
    from accelerate import Accelerator

    from nitp_ops.trainers.accelerate import Accumulation

    with launched(rank, folder):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = tiny_llama()
        accumulation = Accumulation(accelerator, nitp_ops.attach(model, SPEC))
        by_hand = ByHand(tiny_llama(), accumulation.handle.objective)
        loader = torch.utils.data.DataLoader(ragged_rows(), batch_size=2, collate_fn=padded)  # type: ignore[arg-type]
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for _ in range(2):
            for batch in accumulation(loader):
                with accelerator.accumulate(model):
                    accumulation.backward(model(**batch).loss)
                    optimizer.step()
                    optimizer.zero_grad()
            loss = by_hand.loss([padded(ragged_rows())])
            assert accumulation.take_log()["loss"] == pytest.approx(loss.item(), rel=1e-9)
            by_hand.step(loss, RATE)
        by_hand.check(accelerator.unwrap_model(model))
        experts_with_accelerate(accelerator)
        experts_whose_gradients_are_added(rank)


def experts_with_accelerate(accelerator: Any) -> None:
    """Two microbatches of a row on either rank."""
    from nitp_ops.trainers.accelerate import Accumulation
    from tests.trainers.every.test_balance import check_step, collate, experts, rows

    model = experts()
    accumulation = Accumulation(accelerator, nitp_ops.attach(model, "ntp"))
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1.0)
    loader: Any = torch.utils.data.DataLoader(rows(), batch_size=1, collate_fn=collate)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in accumulation(loader):
        with accelerator.accumulate(prepared):
            accumulation.backward(prepared(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    check_step(model, 1, accumulation.take_log())


def experts_whose_gradients_are_added(rank: int) -> None:
    """A loop without DDP."""
    from tests.trainers.every.test_balance import check_step, experts, microbatches

    model = experts()
    handle = nitp_ops.attach(model, "ntp")
    mine = microbatches(1)[rank::RANKS]
    handle.set_counts(
        (handle.count(mine[0]) + handle.count(mine[1])).all_reduce(), gradient_reduction="sum"
    )
    for batch in mine:
        model(**batch).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter -= parameter.grad
    check_step(model, 1)


@pytest.mark.parametrize(
    "worker", [trainer_of_objectives, stock_trainer, accelerate_loop], ids=lambda f: f.__name__
)
def test_two_ranks_train_like_one_process(tmp_path, worker):
    on_two_ranks(worker, tmp_path)
