"""`benchmarks --case host`: microseconds of a call beside eager, of losses that are the same."""

import json

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.suites import gate, host


def test_every_pair_is_the_same_loss(monkeypatch):
    """But for the one whose objective has a projector of its own."""
    losses = []
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: losses.append(self.item()))
    for name, pair in host.steps().items():
        if "nitp" in name:
            continue
        losses.clear()
        for step in pair:
            step()
        assert losses[0] == pytest.approx(losses[1], rel=1e-5), name


def test_a_step_of_twice_the_time_has_the_ratio_two(monkeypatch):
    now = {"at": 0.0}

    def step(seconds: float):
        def advance() -> None:
            now["at"] += seconds

        return advance

    monkeypatch.setattr(host.time, "perf_counter", lambda: now["at"])
    rows = host.measured(step(2e-6), step(1e-6), rounds=3, calls=4)
    assert rows["ours"]["median"] == pytest.approx(2) and rows["ratio"]["median"] == pytest.approx(
        2
    )


@pytest.mark.programs
def test_the_case_prints_a_line_for_each_and_writes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gate, "refused", lambda ops: False)
    out = tmp_path / "host.json"
    assert command.main(["--case", "host", "--quick", "--json", str(out)]) == 0
    document, said = json.loads(out.read_text()), capsys.readouterr().out
    assert len(document["cases"]) >= 4
    assert all(f"| {name} |" in said for name in document["cases"])


def test_what_it_does_not_write_is_one_line(tmp_path, capsys):
    assert command.main(["--case", "host", "--markdown", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
