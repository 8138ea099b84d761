"""`benchmarks/gpu.sh short` where somebody ends it, the disk is full, files are damaged, or two
calls run at once."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.gpu import run_report, stages
from benchmarks.gpu.short.kinds import Rows
from benchmarks.measure.isolated import Isolated, MeasurementError
from benchmarks.report import storage
from tests.benchmarks.gpu.short_cases import INFO, Clock, case, dry, kept, runner

pytestmark = pytest.mark.programs


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_who_is_ended_in_a_stage_says_so_in_one_line_and_takes_its_processes_along(tmp_path, sent):
    """As by Ctrl-C, or by a machine at the end of its time; the budget would be over minutes later."""
    # a shell ignores SIGINT in what it runs behind it, and so would the child
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    run = dry(tmp_path, 60_000, start_new_session=True, stderr=subprocess.PIPE, preexec_fn=heeds)
    assert run.stdout is not None
    for line in run.stdout:
        if "time.sleep(0.8)" in line:
            break
    os.killpg(run.pid, sent)
    start = time.monotonic()
    _, said = run.communicate(timeout=30)
    assert (run.returncode, said) == (
        130,
        "benchmarks/gpu.sh: stopped; what was measured until now is kept\n",
    )
    assert time.monotonic() - start < 15
    assert list(kept(tmp_path)["stages"]) == ["doctor"]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_step_is_killed_where_its_lines_cannot_be_passed_on(tmp_path, monkeypatch):
    path = tmp_path / "pid"
    code = (
        f"import os, sys, time; open({str(path)!r}, 'w').write(str(os.getpid())); print(1, "
        "flush=True); time.sleep(60)"
    )

    def closed(*_, **__):
        if path.exists():
            raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    start = time.monotonic()
    with pytest.raises(BrokenPipeError):
        stages.run([stages.python("-c", code)])
    while alive(int(path.read_text())) and time.monotonic() - start < 20:
        os.waitpid(int(path.read_text()), 0)
    assert not alive(int(path.read_text())) and time.monotonic() - start < 20


def test_bytes_that_are_no_text_do_not_end_a_stage(capsys):
    step = stages.python("-c", r"import sys; sys.stdout.buffer.write(b'\xff 9 passed\n')")
    assert stages.run([step])[::2] == (0, "\ufffd 9 passed")
    assert stages.run([step], float("inf"))[0] == 0


def test_a_timer_that_comes_too_late_is_quiet(capfd):
    done = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True, text=True)
    done.wait()
    stages._end(done)
    assert not capfd.readouterr().err


def test_no_process_starts_after_the_run_is_over(monkeypatch):
    """Of a thread that warms caches, say: nobody would end it."""
    with Isolated() as process:
        pass
    monkeypatch.setattr(process, "start", lambda: pytest.fail("started"))
    with pytest.raises(MeasurementError, match="the run is over"):
        process.run(lambda at, names: None, ["x"], patience=9, deadline=time.monotonic() + 9)


def test_a_full_disk_loses_the_file_alone(tmp_path, capsys, monkeypatch):
    made, processes = runner(tmp_path, 100, Clock(), 1)
    write, written = storage.write, []

    def full(path, text):
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device", str(path))
        write(path, text)

    monkeypatch.setattr(storage, "write", full)
    assert made.run([Rows(case(size), 1) for size in (1, 2, 3)]) == 1
    assert len(processes["ours"].asked) == 3
    said = capsys.readouterr()
    assert (
        said.out.count("not kept: [Errno 28] No space left on device") == 1
        and "not all is kept" in said.out
    )
    assert said.err == "benchmarks/gpu.sh: keeping the results failed, see above\n"
    # the next write had room
    assert [each["sizes"]["N"] for each in kept(tmp_path)["cases"]] == [1, 2, 3]


def test_two_calls_at_once_keep_what_either_measured(tmp_path):
    one, _ = runner(tmp_path, 100, Clock(), 1)
    other, processes = runner(tmp_path, 100, Clock(), 1)
    one.run([Rows(case(1), 1)])
    other.run([Rows(case(2), 1), Rows(case(1), 1)])
    assert [each["sizes"]["N"] for each in kept(tmp_path)["cases"]] == [1, 2]
    # the second has seen what the first has kept
    assert processes["ours"].asked == [["ours", "eager"]]


@pytest.mark.parametrize(
    "damage",
    [
        {"machine": 3},
        {"cases": None},
        {"cases": [{}]},
        {"cases": 3},
        {"stages": []},
        {"records": [{"op": "ceiling"}]},
        {"cases": [{"op": "swiglu", "sizes": 3, "dtype": "x", "rows": {}}]},
    ],
)
def test_a_file_that_lacks_what_results_have_is_one_line(tmp_path, damage):
    path = storage.results_path(INFO, tmp_path)
    whole = {"machine": INFO, "stages": {}, "cases": [], "fake": True, **damage}
    storage.write(path, json.dumps(whole))
    with pytest.raises(ValueError, match=r"abc\.json: these are no results of a GPU") as raised:
        runner(tmp_path, 9, Clock(), 1)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="no results of a GPU"):
        run_report.merged({"machine": INFO}, {"machine": INFO, "stages": {}, "cases": []})
