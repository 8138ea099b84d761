"""Lightning's Trainer: windows, steps, logs, checks and checkpoints, against the formula and
against plain runs."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("lightning")
pytest.importorskip("transformers")
import lightning as L

import nitp_ops
from nitp_ops.objectives import Streams
from nitp_ops.trainers.lightning import SIDECAR, ObjectiveCallback
from tests.trainers.cases.lightning import (
    LATE,
    QUIET,
    SPEC,
    OwnStreams,
    Unsized,
    Wrapped,
    by_hand,
    fit,
    llama,
    rows,
    tokens,
)

pytestmark = [pytest.mark.trainers, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "count"), [(8, 1, 8), (2, 4, 8), (2, 4, 10), (2, 3, 8), (1, 8, 8)]
)
def test_the_steps_are_those_of_the_formula_however_a_window_is_cut(batch_size, accumulate, count):
    data, size = rows(count), batch_size * accumulate
    expected = by_hand([data[start : start + size] for start in range(0, count, size)])
    module = Wrapped(llama())
    fit(module, data, ObjectiveCallback(SPEC), batch_size, accumulate_grad_batches=accumulate)
    for name, parameter in module.model.named_parameters():
        torch.testing.assert_close(
            parameter, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_loader_without_a_length_is_read_ahead_too():
    expected, module = by_hand([rows()]), Wrapped(llama())
    fit(
        module, Unsized(), ObjectiveCallback(SPEC), accumulate_grad_batches=4, limit_train_batches=4
    )
    for name, parameter in module.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-9, atol=1e-12)


def test_a_module_with_streams_of_its_own_trains_on_the_whole_window():
    whole, parts = OwnStreams(), OwnStreams()
    callbacks = [
        ObjectiveCallback(streams=lambda batch: Streams(**tokens(batch))) for _ in range(2)
    ]
    fit(whole, rows(), callbacks[0], 8)
    fit(parts, rows(), callbacks[1], 2, accumulate_grad_batches=4)
    start = dict(OwnStreams().named_parameters())
    for (name, mine), theirs in zip(parts.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)
        assert not torch.equal(mine, start[name]), name


def test_a_resumed_run_continues_to_the_bit_with_own_parameters_and_schedule(tmp_path: Path):
    whole, first, second = (Wrapped(llama(), torch.optim.AdamW) for _ in range(3))
    fit(whole, rows(), ObjectiveCallback(LATE), max_epochs=2, accumulate_grad_batches=2)
    trainer = fit(first, rows(), ObjectiveCallback(LATE), accumulate_grad_batches=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    options = {"max_epochs": 2, "accumulate_grad_batches": 2, "ckpt_path": tmp_path / "half.ckpt"}
    fit(second, rows(), ObjectiveCallback(LATE, seed=9), **options)
    for name, parameter in whole.named_parameters():
        assert torch.equal(second.get_parameter(name), parameter), name
    half, weights = (
        torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("half", "weights")
    )
    own = {f"terms.{t}.{p}" for t in ("nitp", "late") for p in ("gate_up", "down")}
    assert set(half[SIDECAR]["parameters"]) == own
    assert SIDECAR not in weights and not any(
        "nitp" in key for key in [*weights["state_dict"], *half["state_dict"]]
    )


def test_a_checkpoint_of_another_objective_or_of_none_is_refused(tmp_path: Path):
    module = Wrapped(llama())
    fit(module, rows(), ObjectiveCallback(SPEC)).save_checkpoint(tmp_path / "spec.ckpt")
    trainer = L.Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    trainer.fit(Wrapped(llama()), DataLoader(rows(), batch_size=2))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(
        ValueError,
        match=r"the checkpoint has the spec \{'ntp'.*, expected "
        r"\{'ntp'.*'late'",
    ):
        fit(
            Wrapped(llama()),
            rows(),
            ObjectiveCallback(LATE),
            ckpt_path=tmp_path / "spec.ckpt",
            max_epochs=2,
        )
    with pytest.raises(ValueError, match="the checkpoint has no nitp_objective, expected one"):
        fit(
            Wrapped(llama()),
            rows(),
            ObjectiveCallback(SPEC),
            ckpt_path=tmp_path / "plain.ckpt",
            max_epochs=2,
        )


def test_logged_components_sum_to_the_logged_loss_of_the_window():
    module, seen = Wrapped(llama()), []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            seen.append({k: v.item() for k, v in trainer.logged_metrics.items()})

    callback = ObjectiveCallback(LATE)
    trainer = L.Trainer(
        callbacks=[callback, Watch()],
        max_epochs=3,
        enable_checkpointing=False,
        accumulate_grad_batches=4,
        **QUIET,
    )
    trainer.fit(module, DataLoader(rows(), batch_size=2))
    logged = trainer.logged_metrics
    parts = sum(logged[f"objective/loss/{part}"].item() for part in ("ntp", "nitp", "late"))
    assert parts == pytest.approx(logged["objective/loss"].item(), rel=1e-6)
    # the third step: global step 2 of a warm-up of 4
    assert logged["objective/loss/late"].item() == pytest.approx(
        0.5 * logged["objective/late/loss"].item(), rel=1e-6
    )
    assert logged["objective/ntp/count"] == sum((row["labels"][1:] != -100).sum() for row in rows())


def test_an_optimizer_without_the_own_parameters_is_an_error_before_step_0():
    module = Wrapped(llama())
    trained = list(module.model.parameters())
    module.configure_optimizers = lambda: torch.optim.SGD(trained, lr=0.1)  # type: ignore[method-assign]
    with pytest.raises(
        ValueError,
        match=r"terms\.nitp\.gate_up, terms\.nitp\.down of the "
        r"objective in no group",
    ):
        fit(module, rows(), ObjectiveCallback(SPEC))
    assert all(
        torch.equal(mine, start) for mine, start in zip(trained, llama().parameters(), strict=True)
    )


def test_evaluation_is_that_of_the_plain_model():
    module, callback = Wrapped(llama()), ObjectiveCallback(SPEC)
    fit(module, rows(), callback, accumulate_grad_batches=4)
    plain = llama()
    plain.load_state_dict(module.model.state_dict())
    module.eval()
    plain.eval()
    batch = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    mine, theirs = module.model(**batch), plain(**batch)
    assert torch.equal(mine.loss, theirs.loss) and torch.equal(mine.logits, theirs.logits)


def test_what_does_not_fit_is_named():
    with pytest.raises(
        ValueError,
        match=r"requires external\[balance\], expected only .*: "
        r"token_ids, last_hidden",
    ):
        fit(Wrapped(llama()), rows(), ObjectiveCallback("ntp + balance: external"))
    manual = Wrapped(llama())
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="automatic_optimization is False, expected True"):
        fit(manual, rows(), ObjectiveCallback(SPEC))
    two = Wrapped(llama())
    two.teacher = copy.deepcopy(two.model)
    with pytest.raises(
        ValueError, match="2 Hugging Face models among model, teacher, expected one"
    ):
        fit(two, rows(), ObjectiveCallback(SPEC))
    fit(two, rows(), ObjectiveCallback(SPEC, model="model"))
    with pytest.raises(ValueError, match="holds 0 objectives, expected a spec or one"):
        fit(Wrapped(llama()), rows(), ObjectiveCallback())
    with pytest.raises(TypeError, match="streams is None, expected a function"):
        fit(OwnStreams(), rows(), ObjectiveCallback())
    attached = Wrapped(llama())
    nitp_ops.attach(attached.model, SPEC)  # type: ignore[arg-type]
    for streams in (None, lambda batch: Streams(**tokens(batch))):
        with pytest.raises(
            ValueError,
            match="spec is None and model is attached already, expected the spec that it was",
        ):
            fit(attached, rows(), ObjectiveCallback(streams=streams))
    fit(attached, rows(), ObjectiveCallback(SPEC))


def test_the_example_runs():
    path = Path(__file__).parents[2] / "examples/trainers/lightning_fit.py"
    # a tiny model: threads would wait for each other
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    printed = dict(
        line.split() for line in done.stdout.splitlines() if line.startswith(("loss", "nitp"))
    )
    assert float(printed["loss"]) == pytest.approx(
        float(printed["loss/ntp"]) + float(printed["loss/nitp"]), abs=2e-4
    )
    assert float(printed["loss/ntp"]) < 4
