"""The pretraining example as a user runs it: fair comparisons, honest tables, weights without a projector."""

from __future__ import annotations

import re

import pytest
import torch

from examples import pretrain
from experiments.analysis import fused_head
from nitp_ops.objectives import ModelInfo, build
from tests.experiments.pretrain_cases import (
    ROOT,
    arguments,
    checkpoint,
    complaint,
    steps_without_times,
)

SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare" / "input.txt"


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    """Both objectives, 20 steps without a stop."""
    out = tmp_path_factory.mktemp("straight")
    assert pretrain.main(arguments(text, out)) == 0
    return out


def test_both_runs_start_from_the_same_weights_and_read_the_same_text(straight):
    first = [steps_without_times(straight / name)[0] for name in ("ntp", "ntp-nitp")]
    assert first[0]["ntp/loss"] == first[1]["ntp/loss"]
    looks = [
        checkpoint.read_table(straight / name / "validation.csv")[0] for name in ("ntp", "ntp-nitp")
    ]
    assert looks[0]["effective_rank"] == looks[1]["effective_rank"]


def test_training_learns_and_writes_a_row_a_step_and_a_picture(straight):
    for name in ("ntp", "ntp-nitp"):
        rows = steps_without_times(straight / name)
        assert [int(row["step"]) for row in rows] == list(range(20))
        assert float(rows[-1]["ntp/loss"]) < float(rows[0]["ntp/loss"]) - 0.3
        looks = checkpoint.read_table(straight / name / "validation.csv")
        assert [int(row["step"]) for row in looks] == [0, 4, 8, 12, 16, 20]
        for look in looks:
            assert float(look["cross_entropy"]) == pytest.approx(float(look["ntp/loss"]), rel=1e-5)
    assert (straight / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_exported_weights_hold_no_projector_and_run_in_the_plain_model(straight):
    plain, with_nitp = (
        checkpoint.load_weights(straight / n / "model.safetensors") for n in ("ntp", "ntp-nitp")
    )
    assert plain.state_dict().keys() == with_nitp.state_dict().keys()
    state = checkpoint.load_checkpoint(straight / "ntp-nitp" / "checkpoint.pt")
    assert state["objective"] and state["model"].keys() == with_nitp.state_dict().keys()
    for name, value in state["model"].items():
        assert torch.equal(value, with_nitp.state_dict()[name])


def test_the_projector_trains_too(straight):
    trained = checkpoint.load_checkpoint(straight / "ntp-nitp" / "checkpoint.pt")["objective"]
    info = ModelInfo(hidden_size=16, vocab_size=256, num_layers=3)
    start = build("ntp + nitp", model=info, seed=0).state_dict()
    assert start.keys() == trained.keys() and start
    for name, value in start.items():
        assert (trained[name] - value).norm() > 0.1 * value.norm(), name


def test_an_objective_of_weight_zero_changes_no_bit_of_the_model(text, tmp_path):
    spellings = ["--objectives", "ntp", "ntp + 0*nitp", "--clip", "0"]
    assert pretrain.main(arguments(text, tmp_path, *spellings)) == 0
    exported = [
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("ntp", "ntp-nitp")
    ]
    assert exported[0] == exported[1]


def test_two_microbatches_make_the_step_of_one_batch(text, tmp_path):
    rows = []
    for batch, accumulate in (("4", "1"), ("2", "2"), ("1", "4")):
        out = tmp_path / batch
        more = [
            "--batch",
            batch,
            "--accumulate",
            accumulate,
            "--steps",
            "2",
            "--objectives",
            "ntp + nitp",
        ]
        assert pretrain.main(arguments(text, out, *more)) == 0
        rows.append(steps_without_times(out / "ntp-nitp")[0])
    for row in rows[1:]:
        assert row["ntp/count"] == rows[0]["ntp/count"] != str(4 * 15)
        for column in ("loss", "nitp/loss", "nitp/constant_predictor_loss", "gradient_norm"):
            assert float(row[column]) == pytest.approx(float(rows[0][column]), rel=1e-5), column


def test_a_loss_that_is_not_finite_stops_the_run_before_it_spoils_the_weights(
    text, tmp_path, capsys
):
    more = ["--lr", "1e30", "--warmup", "0", "--objectives", "ntp", "--clip", "0"]
    assert pretrain.main(arguments(text, tmp_path, *more)) == 1
    line = complaint(capsys)
    assert "gradient norm" in line and "lower --lr" in line


def test_what_is_printed_at_the_end_is_what_the_tables_hold(text, straight, capsys):
    assert pretrain.main(arguments(text, straight, "--resume")) == 0
    printed = capsys.readouterr().out
    first, second = (
        checkpoint.read_table(straight / n / "validation.csv")[-1] for n in ("ntp", "ntp-nitp")
    )
    for look in (first, second):
        assert f"{float(look['cross_entropy']):.4f}" in printed
        assert f"{float(look['effective_rank']):.2f}" in printed
    names = ("loss", "constant_predictor_loss", "skill")
    loss, constant, skill = (float(second[f"nitp/{name}"]) for name in names)
    latent = [("latent-term loss", loss), ("constant-predictor loss", constant), ("skill", skill)]
    for title, value in latent:
        assert re.search(rf"{title} .* {value:.4f}\s*$", printed, re.MULTILINE), title
    assert f"{float(second['cross_entropy']) - float(first['cross_entropy']):+.4f}" in printed


def test_bfloat16_and_other_objectives_train_too(text, tmp_path):
    objectives = [
        "ntp + 0.5*nitp(distance=mse, projector=linear)",
        "ntp + schedule(to=1.0, warmup=3)*nitp",
    ]
    more = ["--dtype", "bfloat16", "--tied", "--steps", "6", "--objectives", *objectives]
    assert pretrain.main(arguments(text, tmp_path, *more)) == 0
    weights = [
        float(row["loss/nitp"]) / float(row["nitp/loss"])
        for row in steps_without_times(tmp_path / "ntp-nitp.2")
    ]
    assert weights == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 1], rel=1e-3)


def test_the_head_measurement_sees_equal_losses_and_less_memory():
    eager, fused = fused_head.compare(1024, 32, 30_000, "float32", "cpu", 1)
    assert fused.loss == pytest.approx(eager.loss, rel=1e-5)
    logits = 1024 * 30_000 * 4
    assert eager.peak_bytes > 1.8 * logits and fused.peak_bytes < eager.peak_bytes


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="tinyshakespeare is not here")
def test_twenty_steps_on_tinyshakespeare_bring_the_loss_down(tmp_path):
    more = ["--objectives", "ntp + nitp", "--dim", "64", "--context", "64", "--batch", "8"]
    assert pretrain.main(arguments(SHAKESPEARE, tmp_path, *more)) == 0
    looks = checkpoint.read_table(tmp_path / "ntp-nitp" / "validation.csv")
    assert float(looks[-1]["cross_entropy"]) < 3.6 < 5.3 < float(looks[0]["cross_entropy"])
    assert float(looks[-1]["nitp/loss"]) < 0.6 < 0.8 < float(looks[0]["nitp/loss"])
