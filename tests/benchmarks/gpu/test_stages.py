"""`benchmarks/gpu.sh` without a GPU: its stages, one JSON of them all, the short table, what the
sanitizers run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.gpu import run_report, sanitize, stages
from benchmarks.report import environment, storage
from nitp_ops.kernels import table

pytestmark = pytest.mark.programs

ROOT = Path(__file__).resolve().parents[3]
GPU = {"gpu": "NVIDIA H200", "multiprocessors": 132, "memory_gib": 139.8, "capability": "9.0"}
GPU |= {"torch": "2.11.0", "cuda": "13.0", "triton": "3.6.0", "commit": "0123456789ab"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "program", [["-m", "benchmarks", "--device", "cuda"], ["-m", "benchmarks.gpu.stages", "test"]]
)
def test_without_a_gpu_it_is_one_line_and_exit_code_two(program):
    done = subprocess.run(
        [sys.executable, *program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "torch sees no GPU" in done.stderr


def document(op, milliseconds, stage="test"):
    value = {"median": milliseconds, "q25": milliseconds, "q75": milliseconds}
    row = {"milliseconds": value, "times_floor": value, "rounds": 3}
    case = {"op": op, "sizes": {"N": 2, "m": 3}, "dtype": "float32"}
    case["rows"] = {
        "floor": row,
        "ours": row,
        "quack": {"skipped": "ModuleNotFoundError: No module named 'cutlass'"},
    }
    return {
        "machine": GPU,
        "stages": {stage: {"code": 0, "seconds": 5.0, "said": "9 passed"}},
        "cases": [case],
    }


def test_stages_of_one_gpu_and_commit_meet_in_one_file(tmp_path, capsys):
    for folder, result in (
        ("a", document("swiglu", 1.0)),
        ("b", document("alignment", 2.0, "large")),
    ):
        storage.write_json(storage.results_path(GPU, tmp_path / folder), result)
    again = storage.results_path(GPU, tmp_path / "c")
    storage.write_json(again, document("swiglu", 4.0))
    for folder in "abc":
        assert run_report.main([str(tmp_path / folder), "--out", str(tmp_path / "all")]) == 0
    path = tmp_path / "all/nvidia-h200/0123456789ab.json"
    whole = json.loads(path.read_text())
    assert list(whole["stages"]) == ["test", "large"]
    assert [(c["op"], c["rows"]["ours"]["milliseconds"]["median"]) for c in whole["cases"]] == [
        ("swiglu", 4.0),
        ("alignment", 2.0),
    ]
    shown = capsys.readouterr().out
    assert "swiglu 2x3 float32" in shown and "large: green in 5 s, 9 passed" in shown
    assert run_report.main([str(tmp_path / "none")]) == 2


def test_results_of_other_commits_do_not_mix():
    other = {**document("swiglu", 1.0), "machine": {**GPU, "commit": "ba9876543210"}}
    with pytest.raises(ValueError, match="do not mix"):
        run_report.merged(document("swiglu", 1.0), other)


def test_rows_and_records_of_one_case_meet_and_the_last_one_stays():
    one, other = document("swiglu", 1.0), document("swiglu", 4.0)
    other["cases"][0]["rows"] = {"ours-triton": {"rounds": 1}, "quack": {"rounds": 2}}
    record = {"op": "training_step", "case": "toy", "implementation": "ntp"}
    one["records"], other["records"] = [record | {"seconds": 1}], [record | {"seconds": 2}]
    whole = run_report.merged(one, {**other, "machine": {**GPU, "memory_gib": 139.9}})
    (case,) = whole["cases"]
    assert list(case["rows"]) == ["floor", "ours", "quack", "ours-triton"] and case["rows"][
        "quack"
    ] == {"rounds": 2}
    assert whole["records"] == [record | {"seconds": 2}]


def test_a_dry_run_is_refused_in_one_line_by_what_collects(tmp_path, capsys):
    fake = {**document("swiglu", 1.0), "fake": True}
    storage.write_json(storage.results_path(GPU, tmp_path / "a"), fake)
    assert run_report.main([str(tmp_path / "a"), "--out", str(tmp_path / "all")]) == 1
    said = capsys.readouterr()
    assert (
        said.err.count("\n") == 1 and "a dry run, nothing was measured" in said.err and not said.out
    )
    with pytest.raises(ValueError, match="do not mix"):
        run_report.merged(document("swiglu", 1.0), fake)
    with pytest.raises(ValueError, match="a dry run has no table"):
        run_report.summary(fake)


def test_the_short_table_has_a_cross_where_somebody_failed_and_red_where_a_stage_did():
    whole = document("swiglu", 1.5)
    whole["records"] = [
        {"op": "training_step", "implementation": "ntp", "tokens_per_s": 51234.5, "peak_gib": 9.5}
    ]
    whole["stages"]["sanitize"] = {"code": 9, "seconds": 61.0, "said": "ERROR SUMMARY: 2 errors"}
    lines = run_report.summary(whole).splitlines()
    assert lines[0].split() == ["time", "/", "floor", "floor", "ms", "ours", "quack"]
    assert lines[2].split() == ["swiglu", "2x3", "float32", "1.500", "1.50", "x"]
    assert lines[3] == "training_step, ntp: 51234 tokens per second, 9.5 GiB at the peak"
    assert lines[5] == "sanitize: RED in 61 s, ERROR SUMMARY: 2 errors"
    assert lines[-1] == environment.machine_line(GPU)


def test_a_stage_is_its_processes_and_what_the_last_one_said():
    ways = [
        f"print('{said}'); raise SystemExit({code})"
        for said, code in (("5 passed", 0), ("1 failed", 3), ("never", 0))
    ]
    steps = [stages.Step([sys.executable, "-c", way]) for way in ways]
    code, seconds, said = stages.run(steps)
    assert (code, said) == (3, "5 passed; 1 failed") and 0 < seconds < 60
    absent = stages.Step(["no-such-program"])
    assert stages.run([absent])[::2] == (1, "no-such-program is not on the PATH")
    assert stages.run([stages.Step(["sleep", "60"])], 1)[::2] == (124, "stopped after 1 s")


def test_a_sanitizer_is_told_by_its_summary():
    said = ["0 results differ", "========= ERROR SUMMARY: 3 errors", "========= bye"]
    assert stages.verdict(said) == "ERROR SUMMARY: 3 errors"
    assert stages.verdict(["..", "12 passed in 3.1s", ""]) == "12 passed in 3.1s"


@pytest.mark.parametrize("stage", stages.STAGES)
def test_every_stage_names_modules_tests_and_options_that_exist(stage, tmp_path):
    for step in stages.steps(stage, tmp_path, "abc"):
        words = step.command
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
        if words[1:3] == ["-m", "benchmarks"]:
            assert command.parser().parse_args(words[3:]).commit == "abc"
        if stage in ("test", "large"):
            assert sum(word.startswith("tests/gpu/test_") for word in words) >= 4


def test_the_sanitized_script_calls_every_row_kernel_and_the_ops():
    assert all(next(sanitize.calls(kernel)) for kernel in table.all_kernels())
    sanitize.ops(torch.device("cpu"), "native")


@pytest.mark.parametrize("kernel", table.all_kernels())
def test_the_sanitized_script_sees_a_kernel_that_differs(kernel, monkeypatch):
    monkeypatch.setattr(sanitize, "LONG", 1200)
    assert not list(sanitize.differences(kernel, torch.ops.nitp_ops, torch.device("cpu")))

    class Lazy:
        def __getattr__(self, name):
            return lambda *arguments: None

    assert list(sanitize.differences(kernel, Lazy(), torch.device("cpu")))
