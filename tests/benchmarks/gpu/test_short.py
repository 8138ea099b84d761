"""`benchmarks/gpu.sh short` without a GPU: its order, budget, resumption, and what is kept whatever
happens."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.gpu import run_report
from benchmarks.gpu.short import __main__ as short
from benchmarks.gpu.short import device, dry_run, order, timed_run
from benchmarks.gpu.short.kinds import Records, Rows, Stage
from benchmarks.measure.isolated import Isolated, MeasurementError
from benchmarks.report import storage
from tests.benchmarks.gpu.short_cases import (
    INFO,
    ROOT,
    Clock,
    Fake,
    case,
    dry,
    kept,
    nothing,
    runner,
)

pytestmark = pytest.mark.programs


def test_what_does_not_fit_is_told_and_first_in_the_next_call(tmp_path, capsys):
    pieces = [Rows(case(1), 5), Rows(case(2), 20), Rows(case(3), 4)]
    made, _ = runner(tmp_path, 14, clock := Clock(), 5)
    assert made.run(pieces) == 0
    assert [each["sizes"]["N"] for each in kept(tmp_path)["cases"]] == [1, 3]
    said = capsys.readouterr().out.splitlines()
    (line,) = [line for line in said if "skipped" in line]
    assert line == "swiglu 2x3 bfloat16 (ours and torch's): skipped, takes 20 s, 9 s are left"
    assert any(
        line.startswith("1 pieces are left for the next call, first swiglu 2x3") for line in said
    )
    clock.now = 0
    made, processes = runner(tmp_path, 30, clock, 5)
    assert made.run(pieces) == 0 and processes["ours"].asked == [["ours", "eager"]]
    assert [each["sizes"]["N"] for each in kept(tmp_path)["cases"]] == [1, 3, 2]


def test_a_budget_too_short_for_one_case_is_one_line(tmp_path, capsys):
    made, processes = runner(tmp_path, 2, Clock(), 5)
    assert made.run([Rows(case(1), 5), Rows(case(2), 20)]) == 2
    assert (
        capsys.readouterr().err
        == "benchmarks/gpu.sh: the budget is too short: no piece takes less than 5 s\n"
    )
    assert not processes["ours"].asked and not any(tmp_path.iterdir())


def test_every_case_is_in_the_file_before_the_next_begins(tmp_path):
    seen = []

    class Watching(Fake):
        def run(self, task, names, *, patience, deadline):
            path = storage.results_path(INFO, tmp_path)
            seen.append(len(json.loads(path.read_text())["cases"]) if path.exists() else 0)
            return super().run(task, names, patience=patience, deadline=deadline)

    made, _ = runner(tmp_path, 100, clock := Clock(), 1)
    made.bench.processes["ours"] = Watching(clock, 1)
    made.run([Rows(case(size), 1) for size in (1, 2, 3)])
    assert seen == [0, 1, 2]


def test_a_peer_has_its_own_process_and_floor_and_hangs_once(tmp_path, capsys):
    pieces = [
        Rows(case(size, [name]), 1, "ours" if name == "ours" else "peers")
        for size in (1, 2)
        for name in ("ours", "quack", "cce")
    ]
    made, processes = runner(tmp_path, 100, Clock(), 1, hang=("quack",))
    assert made.run(pieces) == 0
    assert processes["peers"].asked == [["quack"], ["cce"], ["cce"]]
    first, second = (each["rows"] for each in kept(tmp_path)["cases"])
    assert (
        list(first) == ["floor", "ours", "quack", "cce"] and "stopped" in first["quack"]["skipped"]
    )
    assert first["floor"]["milliseconds"]["median"] == 1.0 and "floor_ms" not in first["ours"]
    assert first["cce"]["floor_ms"]["median"] == 3.0
    assert list(second) == ["floor", "ours", "cce"]
    assert "skipped, quack stopped: no answer within 60 s" in capsys.readouterr().out


def test_a_missing_peer_is_one_line_and_no_process(tmp_path, capsys):
    made, processes = runner(tmp_path, 100, Clock(), 1)
    made.run([Rows(case(1, ["quack"]), 1, "peers", "quack needs cutlass, not installed")])
    assert not processes["peers"].asked
    assert "(quack): skipped, quack needs cutlass, not installed" in capsys.readouterr().out


def test_who_was_absent_is_tried_again_and_a_green_stage_is_not(tmp_path):
    rows = {
        "rows": {
            "ours": {"skipped": "BackendError: no image"},
            "eager": {"skipped": "OutOfMemoryError: "},
        }
    }
    document = {
        "cases": [{"op": "swiglu", "sizes": {"N": 1, "m": 3}, "dtype": "bfloat16", **rows}],
        "stages": {},
    }
    assert Rows(case(1), 1).left(document) == ["ours"]
    stage = Stage("test", 1, ())
    assert stage.left(document) == ["test"] == stage.left({"stages": {"test": {"code": 1}}})
    assert stage.left({"stages": {"test": {"code": 0}}}) == []
    records = Records("ceiling", "x", ("copy", "gemm"), 1, nothing)
    assert records.left(
        {"records": [{"op": "ceiling", "case": "x", "implementation": "gemm"}]}
    ) == ["copy"]


def test_results_that_came_back_to_the_tree_count_and_those_of_a_dirty_one_do_not(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(storage, "RESULTS", tmp_path / "tree")
    monkeypatch.setattr(storage.results_path, "__defaults__", (tmp_path / "tree", ""))
    for commit, asked in (("abc", []), ("abc-dirty", [["ours", "eager"]])):
        info = dry_run.machine(commit)
        for folder in ("tree", "out"):
            made, processes = runner(tmp_path / folder, 100, Clock(), 1, info=info)
            made.run([Rows(case(1), 1)])
        assert processes["ours"].asked == asked


def test_what_the_end_of_the_budget_stopped_has_not_failed():
    row, gone = {"rounds": 1}, {"skipped": "ours: stopped: no answer within 0 s"}
    one, other = (
        {"op": "swiglu", "rows": rows}
        for rows in ({"floor": row, "ours": row, "x": gone}, {"floor": row, "x": gone})
    )
    found = {
        "stages": {"test": {"code": 124}, "doctor": {"code": 0}},
        "cases": [one, other],
        "records": [gone],
    }
    left = timed_run.without_the_stopped(found)
    assert left == {
        "stages": {"doctor": {"code": 0}},
        "cases": [{"op": "swiglu", "rows": {"floor": row, "ours": row}}],
    }


def test_the_order_is_by_worth():
    names = [piece.name for piece in order.pieces("9.0")]
    first = [
        "ceiling",
        "doctor",
        "test",
        *["implicit_token_loss"] * 3,
        *["training_step"] * 4,
        "linear_cross_entropy 4096x4096x128256",
    ]
    assert all(name.startswith(begin) for name, begin in zip(names, first, strict=False))
    places = [
        next(n for n, name in enumerate(names) if begin in name)
        for begin in (
            "(quack-scaled",
            "swiglu_rows",
            "counters",
            "chunk_rows",
            "(liger)",
            "racecheck",
        )
    ]
    assert places == sorted(places) and places[-1] == len(names) - 1


def test_two_calls_hold_their_budgets_and_a_killed_one_keeps_what_it_measured(tmp_path):
    """The whole preset with its processes, a hundred times faster."""
    first = dry(tmp_path, 230)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 0 and "left for the next call" in said
    took = [float(each) for each in re.findall(r"^.+: ([\d.]+) s of \d+$", said, re.M)]
    assert len(took) > 5 and 100 < sum(took) <= 230
    before = kept(tmp_path)
    assert before["fake"] and before["stages"]["test"]["code"] == 0
    took = time.monotonic()
    second = dry(tmp_path, 480, start_new_session=True)
    path = storage.results_path(INFO, tmp_path)
    while len(json.loads(path.read_text())["cases"]) < len(before["cases"]) + 4:
        assert time.monotonic() - took < 60
        time.sleep(0.01)
    os.killpg(second.pid, signal.SIGKILL)
    second.wait()
    killed = kept(tmp_path)
    assert killed["stages"] == before["stages"] and len(killed["cases"]) > len(before["cases"])
    for old, new in zip(before["cases"], killed["cases"], strict=False):
        assert (
            run_report.identity(old) == run_report.identity(new)
            and old["rows"].items() <= new["rows"].items()
        )
    third = dry(tmp_path, 1500)
    said, _ = third.communicate(timeout=120)
    assert "\ntest: " not in said  # green already
    assert all(not piece.left(kept(tmp_path)) for piece in order.pieces("9.0"))
    assert run_report.main([str(tmp_path), "--out", str(tmp_path / "all")]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line_and_exit_code_two(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.short",
        "--budget-s",
        "60",
        "--bundle-mib",
        "9",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not done.stdout and not any(tmp_path.iterdir())
    assert (
        done.stderr == "benchmarks/gpu.sh: torch sees no GPU (torch.cuda.is_available() is False)\n"
    )


def test_a_library_without_code_for_the_gpu_is_one_line_and_the_rest_goes_on(monkeypatch, capsys):
    told = {
        "machine": {"capability": "7.5", "commit": "abc"},
        "native": "no kernel image",
        "built_of": None,
    }
    monkeypatch.setattr(device, "_ask", lambda *_: told)
    with Isolated() as process:
        info = device.about(process, None, ROOT, time.monotonic() + 60)
    assert info["capability"] == "7.5"
    assert capsys.readouterr().out.splitlines()[-1] == (
        "library: ours without CUDA C++ kernels: there are no CUDA kernels for compute capability "
        "7.5"
    )


def test_results_of_another_machine_are_one_line(tmp_path, capsys, monkeypatch):
    kept = {"machine": {**INFO, "torch": "2.11.0"}, "stages": {}, "cases": [], "fake": True}
    storage.write_json(storage.results_path(INFO, tmp_path), kept)
    with pytest.raises(ValueError, match="do not mix"):
        runner(tmp_path, 9, Clock(), 1)
    monkeypatch.setattr(dry_run, "ready", lambda *_: None)
    options = [
        "--budget-s",
        "9",
        "--bundle-mib",
        "9",
        "--dry-run",
        "--commit",
        "abc",
        "--out",
        str(tmp_path),
    ]
    assert short.main(options) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "do not mix" in said


def test_a_failure_under_no_name_is_a_reason_of_each(tmp_path):
    class Broken(Fake):
        def run(self, task, names, *, patience, deadline):
            raise MeasurementError("RuntimeError: of nobody")

    made, _ = runner(tmp_path, 100, clock := Clock(), 1)
    made.bench.processes["ours"] = Broken(clock, 1)
    assert made.run([Records("ceiling", "x", ("copy",), 1, nothing), Rows(case(1), 1)]) == 1
    assert kept(tmp_path)["records"][0]["skipped"] == "RuntimeError: of nobody"


def test_a_piece_that_breaks_loses_itself_alone(tmp_path, capsys):
    made, _ = runner(tmp_path, 100, clock := Clock(), 1)

    class Odd(Fake):
        def run(self, task, names, *, patience, deadline):
            return {"copy": {"per_second": float("nan")}}, {}

    made.bench.processes["ours"], made.bench.processes["peers"] = Odd(clock, 1), Fake(clock, 1)
    assert (
        made.run([Records("ceiling", "x", ("copy",), 1, nothing), Rows(case(1), 1, "peers")]) == 1
    )
    assert "ceiling x (copy): ValueError: Out of range float values" in capsys.readouterr().out
    assert [each["sizes"]["N"] for each in kept(tmp_path)["cases"]] == [
        1
    ] and "records" not in kept(tmp_path)
