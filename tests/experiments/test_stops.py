"""The pretraining example when it cannot go on: exact resumption, the last good checkpoint, one
clear line."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples import pretrain
from experiments.train import run as run_module
from tests.experiments.pretrain_cases import (
    ROOT,
    SCRIPT,
    arguments,
    assert_same_run,
    checkpoint,
    complaint,
    steps_without_times,
)

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture(autouse=True)
def heeded():
    """Every signal as a shell leaves it, whatever started the tests (nohup, a job in the
    background)."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    """Both objectives, 20 steps without a stop."""
    out = tmp_path_factory.mktemp("straight")
    assert pretrain.main(arguments(text, out)) == 0
    return out


def before_step(monkeypatch, number, objective, action):
    """Let `action` happen just before that step of that run."""
    original = run_module.Run.step

    def step(run):
        if run.done == number and run.name == objective:
            action()
        return original(run)

    monkeypatch.setattr(run_module.Run, "step", step)


def crash():
    raise RuntimeError("the machine went away")


@pytest.mark.parametrize(
    ("action", "code"),
    [(lambda: signal.raise_signal(signal.SIGTERM), 143), (crash, None)],
    ids=["SIGTERM", "crash"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    text, straight, tmp_path, monkeypatch, action, code
):
    with monkeypatch.context() as interrupted:
        before_step(interrupted, 13, "ntp + nitp", action)
        if code is None:
            with pytest.raises(RuntimeError, match="went away"):
                pretrain.main(arguments(text, tmp_path))
        else:
            assert pretrain.main(arguments(text, tmp_path)) == code
    stopped_at = checkpoint.load_checkpoint(tmp_path / "ntp-nitp" / "checkpoint.pt")["step"]
    assert stopped_at == (14 if code else 10)
    assert pretrain.main(arguments(text, tmp_path, "--resume")) == 0
    assert_same_run(tmp_path / "ntp", straight / "ntp")
    assert_same_run(tmp_path / "ntp-nitp", straight / "ntp-nitp")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_saved_and_says_how_to_go_on(text, tmp_path, monkeypatch, capsys, number):
    before = signal.getsignal(number)
    before_step(monkeypatch, 7, "ntp", lambda: signal.raise_signal(number))
    assert pretrain.main(arguments(text, tmp_path)) == CODES[number]
    line = complaint(capsys)
    assert "stopped after step 8 of 20" in line and line.endswith("--resume")
    assert checkpoint.load_checkpoint(tmp_path / "ntp" / "checkpoint.pt")["step"] == 8
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("first", "second"), [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGHUP)]
)
def test_a_second_signal_acts_at_once(text, tmp_path, monkeypatch, capsys, first, second):
    def twice():
        signal.raise_signal(first)
        signal.raise_signal(second)

    before_step(monkeypatch, 7, "ntp", twice)
    assert pretrain.main(arguments(text, tmp_path)) == CODES[second]
    assert "stopped at once" in complaint(capsys)
    assert checkpoint.load_checkpoint(tmp_path / "ntp" / "checkpoint.pt")["step"] == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_is_ignored_stays_ignored(text, tmp_path, monkeypatch, number):
    """As nohup leaves SIGHUP, and a shell SIGINT for a job in the background."""
    signal.signal(number, signal.SIG_IGN)
    before_step(monkeypatch, 1, "ntp", lambda: signal.raise_signal(number))
    assert pretrain.main(arguments(text, tmp_path, "--steps", "2", "--objectives", "ntp")) == 0
    assert signal.getsignal(number) is signal.SIG_IGN


def test_a_terminal_that_hung_up_takes_no_line_and_the_exit_code_stays(text, tmp_path, monkeypatch):
    class Gone(io.StringIO):
        def write(self, _):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    before_step(monkeypatch, 7, "ntp", lambda: signal.raise_signal(signal.SIGHUP))
    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(sys, "stderr", Gone())
    assert pretrain.main(arguments(text, tmp_path)) == 129
    assert checkpoint.load_checkpoint(tmp_path / "ntp" / "checkpoint.pt")["step"] == 8


def test_a_full_disk_leaves_the_last_good_checkpoint(text, straight, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        before_step(disk, 12, "ntp", lambda: disk.setattr(checkpoint.os, "fsync", full))
        assert pretrain.main(arguments(text, tmp_path)) == 1
    line = complaint(capsys)
    assert (
        "No space left on device" in line
        and "checkpoint of step 10 is intact" in line
        and "--resume" in line
    )
    assert checkpoint.load_checkpoint(tmp_path / "ntp" / "checkpoint.pt")["step"] == 10
    assert not list((tmp_path / "ntp").glob(".*"))
    assert pretrain.main(arguments(text, tmp_path, "--resume")) == 0
    assert_same_run(tmp_path / "ntp", straight / "ntp")


def test_a_disk_that_is_really_full_leaves_the_last_good_checkpoint(text, straight, tmp_path):
    size = (straight / "ntp-nitp" / "checkpoint.pt").stat().st_size * 3 // 2
    mount = f"mount -t tmpfs -o size={size} none {tmp_path}"
    if subprocess.run(
        ["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False
    ).returncode:
        pytest.skip("this user may not mount a file system")
    kept = tmp_path.with_name("kept.pt")
    command = [sys.executable, SCRIPT, *arguments(text, tmp_path, "--objectives", "ntp + nitp")]
    inside = f'{mount} && "$@"; code=$?; cp {tmp_path}/ntp-nitp/checkpoint.pt {kept}; exit $code'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", inside, "sh", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert "No space left on device" in line and "checkpoint of step 5 is intact" in line
    assert checkpoint.load_checkpoint(kept)["step"] == 5


def test_a_signal_from_outside_ends_with_its_code_and_a_checkpoint(text, tmp_path):
    command = [
        sys.executable,
        SCRIPT,
        *arguments(text, tmp_path),
        "--steps",
        "1000000",
        "--objectives",
        "ntp + nitp",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        give_up = time.monotonic() + 240
        while (
            len(checkpoint.read_table(tmp_path / "ntp-nitp" / "steps.csv")) < 3
            and time.monotonic() < give_up
        ):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        (line,) = process.communicate(timeout=240)[1].splitlines()
    assert process.returncode == 143
    done = checkpoint.load_checkpoint(tmp_path / "ntp-nitp" / "checkpoint.pt")["step"]
    assert f"stopped after step {done} of 1000000" in line and line.endswith("--resume")
    assert len(checkpoint.read_table(tmp_path / "ntp-nitp" / "steps.csv")) == done


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("examples/pretrain.py", signal.SIGINT),
        ("experiments/ablations.py", signal.SIGTERM),
        ("experiments/evidence.py", signal.SIGHUP),
    ],
)
def test_a_signal_while_torch_is_still_loading_ends_with_one_line(tmp_path, path, number):
    (tmp_path / "torch.py").write_text(
        f"import os, time; os.kill(os.getpid(), {number}); time.sleep(9)"
    )
    # The folder of the script comes first on the path, this one before the installed packages.
    done = subprocess.run(
        [sys.executable, ROOT / path],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (
        CODES[number],
        f"{Path(path).stem}: stopped before anything began\n",
    )


def test_starting_anew_keeps_the_earlier_run_beside_it(text, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "out")
    assert (
        pretrain.main(arguments(text, tmp_path / "out", "--steps", "2", "--objectives", "ntp")) == 0
    )
    assert len(steps_without_times(tmp_path / "out" / "ntp")) == 2
    assert_same_run(tmp_path / "out" / "ntp.previous", straight / "ntp")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--objectives", "ntp", "ntp + 0.5*nitp"], "nitp.weight"),
        (["--objectives", "ntp(z_loss=0.1)", "ntp + nitp"], "ntp.z_loss"),
        (["--dim", "32"], "--dim 16, this run has --dim 32"),
        (["--lr", "0.1"], "--lr"),
        (["--data", str(SCRIPT)], "the text"),
        (["--objectives", "nitp"], "holds no checkpoint of nitp"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(text, straight, capsys, more, said):
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    assert pretrain.main(arguments(text, straight, "--resume", *more)) == 2
    assert said in complaint(capsys)
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*")} == before
