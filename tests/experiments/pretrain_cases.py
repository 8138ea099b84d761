"""What the tests of the pretraining example share: its modules, a small text, a small model, how to
read results."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from experiments.analysis import arms
from experiments.analysis import results as results
from experiments.train import checkpoint
from nitp_ops.objectives import parse

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "pretrain.py"

OPTIONS = """
    --threads 1 --dim 16 --layers 3 --heads 2 --kv-heads 1 --context 16 --batch 4 --steps 20
    --eval-every 4 --eval-windows 8 --checkpoint-every 5 --no-fused-head
"""


def write_text(folder):
    """Small files of unequal length: windows cross file borders and hold unequal numbers of
    targets."""
    for number in range(120):
        lines = [f"{number} {line * line % 97} walks.\n" for line in range(1 + number % 7)]
        (folder / f"{number:03}.txt").write_text("".join(lines))
    return folder


def arguments(text, out, *more):
    return [*OPTIONS.split(), "--data", str(text), "--out", str(out), *more]


def steps_without_times(folder):
    rows = checkpoint.read_table(folder / "steps.csv")
    assert all(float(row.pop("seconds")) > 0 for row in rows)
    return rows


def assert_same_run(one, other):
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert steps_without_times(one) == steps_without_times(other)
    assert (one / "validation.csv").read_text() == (other / "validation.csv").read_text()
    states = [checkpoint.load_checkpoint(folder / "checkpoint.pt") for folder in (one, other)]
    for part in ("model", "objective"):
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name]), name


def complaint(capsys):
    """The one line on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pretrain: ")
    return line


def verdicts(text):
    """Words by which a page would call a difference real, or not."""
    words = r"(?:in|out)side the spread|outside what|differs at|reproduces|opposite at|seeds needed|tell them apart"
    return re.findall(rf"{words}|± [\d.]+ \*", text)


def fake(name: str, seed: int, probes: float = 0.5, **numbers: float):
    """An result made of numbers alone."""
    expression = "ntp" if name == "ntp" else "ntp + nitp"
    arm = arms.Arm(name, expression, parse(expression), name, "a test", 1.0)
    keys = [
        f"{kind}/{j}"
        for kind in ("linear_probe", "knn_probe", "probe_baseline")
        for j in range(1, 9)
    ]
    latent = (
        dict.fromkeys(("nitp/loss", "nitp/constant_predictor_loss", "nitp/skill"), 0.25)
        if name != "ntp"
        else {}
    )
    base = {
        "cross_entropy": 1.0,
        "effective_rank": 9.0,
        "mean_cosine": 0.2,
        "rows": 64,
        "parameters": 9,
    }
    steps = {
        "step_low": 0.9,
        "step_seconds": 1.0,
        "step_high": 1.1,
        "tokens_per_step": 64,
        "own_parameters": 0,
    }
    return results.Result(
        arm, seed, {**base, **steps, **latent, **dict.fromkeys(keys, probes), **numbers}, [1.0, 2.0]
    )
