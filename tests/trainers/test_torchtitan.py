"""torchtitan: its llama3 on the CPU, and its Trainer for a few steps, against the formula and
against itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchtitan")
pytest.importorskip("nitp_ops.trainers.torchtitan", exc_type=ImportError)
from torchtitan.components.loss import cross_entropy_loss
from torchtitan.config import ConfigManager
from torchtitan.hf_datasets import text_datasets
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.trainer import Trainer

from nitp_ops.objectives import Streams
from nitp_ops.trainers import torchtitan as adapter
from tests.support import packed_texts
from tests.trainers.cases.torchtitan import (
    ROOT,
    SPEC,
    formula,
    gradients,
    ragged_batch,
    same,
    tiny_decoder,
)

pytestmark = [pytest.mark.trainers, pytest.mark.filterwarnings("ignore")]


def test_loss_and_gradients_are_those_of_the_formula():
    model = tiny_decoder()
    adapter.attach_decoder(model, SPEC)
    tapped, batch = adapter.tap_decoder(model), ragged_batch()
    out = adapter.objective_loss(model, tapped, **batch)
    expected = formula(model, batch)
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=0)
    same(gradients(out.loss, model), gradients(expected, model), 2e-5)


def test_microbatches_with_unequal_counts_add_up_to_the_batch():
    model = tiny_decoder()
    objective = adapter.attach_decoder(model, SPEC)
    tapped, batch = adapter.tap_decoder(model), ragged_batch(rows=4)
    batch["labels"][0] = -100
    whole = adapter.objective_loss(model, tapped, **batch)
    parts: list[dict[str, Any]] = [
        {name: value[b : b + 1] for name, value in batch.items()} for b in range(4)
    ]
    streams = [
        Streams(token_ids=p["inputs"], shift_labels=p["labels"], position_ids=p["positions"])
        for p in parts
    ]
    counts = sum((objective.count(s) for s in streams[1:]), start=objective.count(streams[0]))
    losses = [adapter.objective_loss(model, tapped, **part, counts=counts).loss for part in parts]
    torch.testing.assert_close(sum(losses), whole.loss, rtol=1e-6, atol=0)
    same(gradients(sum(losses), model), gradients(whole.loss, model), 2e-5)  # type: ignore[arg-type]


def test_ntp_on_its_own_packed_texts_is_its_own_loss(monkeypatch):
    monkeypatch.setitem(text_datasets.DATASETS, "texts", packed_texts.CONFIG)
    data = text_datasets.HuggingFaceTextDataset("texts", None, packed_texts.Tokenizer(), seq_len=32)
    rows, labels = zip(*data, strict=True)
    inputs, positions = (
        torch.stack([row[name] for row in rows]) for name in ("input", "positions")
    )
    model = tiny_decoder()
    batch: dict[str, Any] = {
        "inputs": inputs,
        "labels": torch.stack(labels),
        "positions": positions,
    }
    assert (positions == 0).sum() > len(rows) and (batch["labels"] == packed_texts.END).sum() > len(
        rows
    )
    expected = (
        cross_entropy_loss(model(inputs, positions=positions), batch["labels"])
        / batch["labels"].numel()
    )
    objective = adapter.attach_decoder(model, "ntp + 0*mtp_shared(offsets=[2])")
    out = adapter.objective_loss(model, adapter.tap_decoder(model), **batch)
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=0)
    same(gradients(out.loss, model), gradients(expected, model), 2e-5)
    counts = objective.count(
        Streams(token_ids=inputs, shift_labels=batch["labels"], position_ids=positions)
    )
    breaks = (positions[:, 1:] == 0).sum()
    assert {name: int(n) for name, n in counts.items()} == {
        "ntp": inputs.numel(), "mtp_shared/2": inputs.numel() - len(rows) - int(breaks)
    }  # fmt: skip


def test_the_plain_model_is_untouched_and_the_objective_stays_out_of_its_state():
    model, batch = tiny_decoder(), ragged_batch()
    before, keys = model(batch["inputs"]), list(model.state_dict())
    adapter.attach_decoder(model, SPEC)
    tapped = adapter.tap_decoder(model)
    adapter.objective_loss(model, tapped, **batch)
    assert torch.equal(model(batch["inputs"]), before)
    assert list(model.state_dict()) == keys
    assert "forward" not in vars(model) and model._skip_lm_head is False
    plain = model.forward
    # another tool's, around the model's
    model.forward = own = lambda *args, **extra: plain(*args, **extra)
    adapter.objective_loss(model, tapped, **batch)
    assert vars(model)["forward"] is own


def test_what_can_not_work_is_named_with_what_to_do():
    config = adapter.with_objective(llama3_debugmodel(), SPEC)
    config.parallelism.pipeline_parallel_degree = 2
    config.parallelism.tensor_parallel_degree = 4
    config.parallelism.context_parallel_degree = 2
    with pytest.raises(ValueError) as caught:
        adapter.ObjectiveTrainer(config)
    for line in (
        "pipeline_parallel_degree is 2, expected 1 (the hidden states of a lower layer are on "
        "another stage",
        "tensor_parallel_degree is 4, expected 1",
        "context_parallel_degree is 2, expected 1",
        "disable_cuda_graphs is False, expected True",
    ):
        assert line in str(caught.value)
    with pytest.raises(
        TypeError,
        match=r"config is a .*ObjectiveTrainer.Config, expected that of "
        r"torchtitan's own",
    ):
        adapter.with_objective(config, "ntp")
    with pytest.raises(
        ValueError,
        match=r"requires external\[balance\], expected only .* "
        r"last_hidden",
    ):
        adapter.attach_decoder(tiny_decoder(1), "ntp + balance: external")
    with pytest.raises(TypeError, match="model is a Linear, expected a Decoder"):
        adapter.attach_decoder(torch.nn.Linear(2, 2), "ntp")  # type: ignore[arg-type]


def test_the_flag_of_the_command_line_is_the_objective(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    args = ["--module", "examples.trainers.torchtitan_train", "--config", "tiny"]
    args += ["--objective", "ntp + 0.3*mtp_sequential"]
    config = ConfigManager().parse_args(args)
    assert isinstance(config, adapter.ObjectiveTrainer.Config) and isinstance(
        config, Trainer.Config
    )
    assert config.objective == "ntp + 0.3*mtp_sequential"


def trained(
    root: Path, runs: dict[str, dict[str, Any]], ranks: int = 1
) -> dict[str, dict[str, Any]]:
    """The real Trainer, run after run, in a process for each rank, see torchtitan_run.py."""
    listed = []
    for name, options in runs.items():
        (root / name).mkdir()
        start = {"start": str(root / options["start"])} if "start" in options else {}
        listed.append({**options, "folder": str(root / name), **start})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(ROOT / "tests/trainers/torchtitan_run.py"), json.dumps(listed)]
    processes, logs = [], [root / f"log-{ranks}-{rank}" for rank in range(ranks)]
    for rank, log in enumerate(logs):
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": port}
        with log.open("w") as out:
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | place
            processes.append(
                subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=root)
            )
    codes = [process.wait(timeout=200) for process in processes]
    assert codes == [0] * ranks, logs[0].read_text()[-3000:]
    return {name: torch.load(root / name / "result.pt") for name in runs}


def losses(run: dict[str, Any]) -> dict[int, dict[str, float]]:
    steps: dict[int, dict[str, float]] = {}
    for row in run["log"]:
        steps.setdefault(row["step"], {}).update(row)
    return steps


def test_its_trainer_with_ntp_alone_is_its_trainer(tmp_path):
    families, kinds = ("llama3", "deepseek_v3"), {"ntp": {"spec": "ntp"}, "plain": {"plain": True}}
    options = {
        f"{f} {kind}": {"family": f, "steps": 3, **own}
        for f in families
        for kind, own in kinds.items()
    }
    for kind in kinds:  # texts that its own dataset packs, labels shifted inside each
        options[f"llama3 {kind}"]["packed"] = True
    found = trained(tmp_path, options)
    for family in families:
        mine, plain = found[f"{family} ntp"], found[f"{family} plain"]
        assert len(losses(plain)) == 3
        for step, row in losses(plain).items():
            expected = pytest.approx(row["loss_metrics/global_avg_loss"], rel=1e-6)
            assert losses(mine)[step]["loss_metrics/global_avg_loss"] == expected
        # Adam divides by the size of tiny gradients
        same(mine["parameters"], plain["parameters"], 1e-3)
        assert mine["saved"] == plain["saved"]


def test_a_resumed_run_and_a_run_on_two_ranks_continue_like_one_process(tmp_path):
    spec = "ntp + 0.8*nitp(target_layer=1) + late: schedule(to=1, warmup=4)*nitp(target_layer=2)"
    options = {
        "spec": spec,
        "ragged": True,
        "config": {"parallelism.spmd_backend": "partial_dtensor"},
    }
    goes_on = {"start": "half", "steps": 4, **options}
    runs = {
        "whole": {"steps": 4, **options},
        "half": {"steps": 2, "interval": 2, **options},
        "resumed": goes_on,
    }
    whole, _, resumed = trained(tmp_path, runs).values()
    two = trained(tmp_path, {"two": goes_on}, ranks=2)["two"]
    assert any("nitp_objective" in name for name in whole["parameters"])
    assert not any("nitp_objective" in name for name in whole["saved"])
    for name, value in whole["parameters"].items():
        assert torch.equal(resumed["parameters"][name], value), name
    same(two["parameters"], whole["parameters"], 1e-3)
    for step, row in losses(two).items():
        assert row["objective/loss"] == pytest.approx(
            losses(whole)[step]["objective/loss"], rel=1e-5
        )
        assert row["objective/ntp/count"] == losses(whole)[step]["objective/ntp/count"]
    for step, row in losses(whole).items():
        contributions = [row[f"objective/loss/{part}"] for part in ("ntp", "nitp", "late")]
        assert sum(contributions) == pytest.approx(row["loss_metrics/global_avg_loss"], rel=1e-6)
        # the weight of `late` at optimizer step n - 1
        assert row["objective/loss/late"] == pytest.approx(
            (step - 1) / 4 * row["objective/late/loss"], rel=1e-6
        )


def test_the_example_runs():
    # a tiny model: threads would wait for each other
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples/trainers/torchtitan_train.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(rows) == 10 and float(rows[-1][3]) < float(rows[0][3])
