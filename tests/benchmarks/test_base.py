"""`benchmarks --base`: two processes, each with its own nitp_ops, in turns; ratios, bits, a
worktree that goes away."""

import argparse
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks.cases import OPS, heading
from benchmarks.measure.worker import Worker
from benchmarks.report import environment
from benchmarks.suites import against_base, gate

pytestmark = pytest.mark.programs

ROOT = environment.ROOT
IN_GIT = (
    subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, check=False
    ).returncode
    == 0
)
TOY = OPS["swiglu"].toy


@pytest.fixture
def toy(monkeypatch):
    import dataclasses

    monkeypatch.setitem(OPS, "swiglu", dataclasses.replace(OPS["swiglu"], quick={"toy": TOY}))
    monkeypatch.setattr(gate, "failed_tests", lambda ops: None)
    monkeypatch.setattr(against_base, "QUICK_ROUNDS", 3)


@contextmanager
def changed(folder: Path, text: str):
    """A copy of the package whose __init__ ends with `text`."""
    (folder / "nitp_ops").mkdir(parents=True)
    for path in (ROOT / "nitp_ops").iterdir():
        if path.name not in ("__pycache__", "__init__.py"):
            (folder / "nitp_ops" / path.name).symlink_to(path)
    (folder / "nitp_ops/__init__.py").write_text((ROOT / "nitp_ops/__init__.py").read_text() + text)
    yield folder


def options(**more):
    return argparse.Namespace(
        **{"op": ["swiglu"], "case": None, "dtype": ["float32"], "quick": True, "threads": 1} | more
    )


SLOW = """
import time as _time
from .ops.swiglu import swiglu as _swiglu
def swiglu(*arguments, **options):
    _time.sleep(0.05)
    return 2 * _swiglu(*arguments, **options)
"""


def test_a_slower_and_different_base_is_seen(toy, tmp_path):
    with changed(tmp_path / "base", SLOW) as folder:
        (case,) = against_base.run_cases(options(), folder)
    assert (
        case["here_over_base"]["q75"] < 0.7
        and against_base.verdict(case["here_over_base"]) == "faster"
    )
    assert (
        case["rows"]["base"]["milliseconds"]["median"] > 50 and case["rows"]["here"]["rounds"] == 3
    )
    assert not case["same_bits"] and "differ" in against_base.table([case])


def test_the_process_imports_the_package_of_its_folder(tmp_path):
    case = heading(OPS["swiglu"], "toy", TOY, against_base.cpu_run.DTYPES["float32"])
    with (
        changed(tmp_path / "base", "") as folder,
        Worker([folder, ROOT], 1) as there,
        Worker([ROOT, ROOT], 1) as here,
    ):
        found, own = there.prepare(case), here.prepare(case)
        assert found["nitp_ops"] == str(folder / "nitp_ops") and own["nitp_ops"] == str(
            ROOT / "nitp_ops"
        )
        assert found["bits"] == own["bits"]
        there.step()
        assert 0 < there.seconds < 10 and there.peak() >= 0
        with pytest.raises(OSError, match="KeyError"):
            here.prepare({**case, "op": "softmax"})


@pytest.mark.skipif(not IN_GIT, reason="no git checkout")
def test_the_same_revision_has_the_same_bits_and_leaves_no_worktree(toy, capfd):
    before = against_base.git("worktree", "list")
    with pytest.MonkeyPatch.context() as patch:
        # as if csrc/ were the same: the library is copied
        patch.setattr(against_base, "BUILT_FROM", ("LICENSE",))
        code = command.main(
            ["--quick", "--op", "swiglu", "--dtype", "float32", "--threads", "1", "--base", "HEAD"]
        )
    shown = capfd.readouterr().out
    assert code == 0 and "swiglu N=6 m=8 float32" in shown and "equal" in shown
    assert f"base {against_base.git('rev-parse', '--short=12', 'HEAD')}" in shown
    assert against_base.git("worktree", "list") == before


@pytest.mark.skipif(not IN_GIT, reason="no git checkout")
def test_an_unknown_revision_is_one_line(toy, capfd):
    assert command.main(["--quick", "--op", "swiglu", "--base", "no-such-revision"]) == 1
    assert capfd.readouterr().err.count("\n") == 1


def test_the_verdict_wants_the_middle_half_on_one_side():
    assert against_base.verdict({"q25": 0.8, "median": 0.9, "q75": 0.99}) == "faster"
    assert against_base.verdict({"q25": 1.01, "median": 1.1, "q75": 1.2}) == "slower"
    assert against_base.verdict({"q25": 0.9, "median": 1.0, "q75": 1.1}) == "no difference"


def test_red_tests_give_no_comparison(monkeypatch, capsys):
    monkeypatch.setattr(gate, "failed_tests", lambda ops: "pytest ended with code 1")
    monkeypatch.setattr(against_base, "checkout", lambda revision: pytest.fail("built"))
    assert command.main(["--quick", "--op", "swiglu", "--base", "HEAD"]) == 1
    assert "red, no numbers" in capsys.readouterr().err
