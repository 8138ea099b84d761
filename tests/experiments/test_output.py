"""The pretraining example where the console, the disk, the memory or the text is poor: one line,
the report written."""

from __future__ import annotations

import io
import os
import sys

import pytest
import torch

from examples import pretrain
from experiments import comparison
from experiments.train import run as run_module
from tests.experiments.pretrain_cases import arguments, checkpoint, complaint

SHORT = ("--steps", "4", "--objectives", "ntp")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_console_of_another_encoding_loses_letters_and_no_report(
    text, tmp_path, monkeypatch, encoding
):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert pretrain.main(arguments(text, tmp_path, *SHORT)) == 0
    said = written.getvalue().decode(encoding)
    assert "sampled from ntp" in said and "?" in said.split("sampled from ntp")[1]
    assert "\N{REPLACEMENT CHARACTER}" in (tmp_path / "report.html").read_text()


def test_a_full_or_closed_standard_output_ends_no_training(text, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as full, open("/dev/full", "w") as device:
        full.setattr(sys, "stdout", device)
        assert pretrain.main(arguments(text, tmp_path / "full", *SHORT)) == 1
    assert complaint(capsys).startswith(
        "pretrain: standard output: No space left on device: what was printed after"
    )
    with monkeypatch.context() as closed:
        closed.setattr(sys, "stdout", None)
        assert pretrain.main(arguments(text, tmp_path / "none", *SHORT)) == 0
    for name in ("full", "none"):
        assert (tmp_path / name / "report.html").exists() and (
            tmp_path / name / "ntp" / "model.safetensors"
        ).exists()


def test_a_reader_that_goes_away_ends_no_training(text, tmp_path, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as pipe, os.fdopen(writer, "w") as stream:
        pipe.setattr(sys, "stdout", stream)
        assert pretrain.main(arguments(text, tmp_path, *SHORT)) == 1
    assert "standard output: Broken pipe" in complaint(capsys)
    assert (tmp_path / "report.html").exists()


def test_a_head_that_can_not_be_measured_costs_no_report(text, tmp_path, monkeypatch, capsys):
    def fails(**_):
        raise RuntimeError("the eager head at 1024 x 256 x 151936 failed: MemoryError")

    monkeypatch.setattr(comparison, "compare_heads", fails)
    assert pretrain.main(arguments(text, tmp_path, *SHORT, "--fused-head")) == 1
    assert (
        complaint(capsys) == "pretrain: the eager head at 1024 x 256 x 151936 failed: MemoryError"
    )
    assert (tmp_path / "report.html").exists() and (tmp_path / "comparison.png").exists()


def exhausted():
    raise MemoryError


@pytest.mark.parametrize(
    "action", [exhausted, lambda: torch.empty(1 << 55)], ids=["Python", "PyTorch"]
)
def test_memory_that_ends_is_one_line_and_the_checkpoint_stays(
    text, tmp_path, monkeypatch, capsys, action
):
    original = run_module.Run.step

    def step(run):
        if run.done == 7:
            action()
        return original(run)

    monkeypatch.setattr(run_module.Run, "step", step)
    assert pretrain.main(arguments(text, tmp_path)) == 1
    assert complaint(capsys) == "pretrain: out of memory; lower --batch, --context or --dim"
    assert checkpoint.load_checkpoint(tmp_path / "ntp" / "checkpoint.pt")["step"] == 5


def test_a_folder_that_may_not_be_made_is_one_line(text, capsys):
    assert pretrain.main(arguments(text, "/proc/nowhere", *SHORT)) == 1
    assert complaint(capsys).startswith("pretrain: /proc/nowhere: ")


@pytest.mark.parametrize(
    "texts",
    [
        [b"xy"] * 700,
        [b"x"] * 400 + [b"hello world "] * 140,
        [b"a" * 3000],
        [b"\n" * 3000],
        ["ü".encode() * 900],
    ],
    ids=["two bytes", "mostly one byte", "one letter", "empty lines", "one wide letter"],
)
def test_a_degenerate_text_trains_and_is_reported(tmp_path, texts):
    (tmp_path / "text").mkdir()
    for number, content in enumerate(texts):
        (tmp_path / "text" / f"{number:03}").write_bytes(content)
    more = ("--steps", "1", "--objectives", "ntp + nitp + mtp_shared")
    assert pretrain.main(arguments(tmp_path / "text", tmp_path / "out", *more)) == 0
    assert (tmp_path / "out" / "report.html").exists()
