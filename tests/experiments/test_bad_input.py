"""What examples/pretrain.py refuses: one line for each problem, exit code 2."""

from __future__ import annotations

import subprocess
import sys

import pytest

from examples import pretrain
from tests.experiments.pretrain_cases import (
    SCRIPT,
    arguments,
    complaint,
)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--data", "/nowhere/text"], "no such file"),
        (["--objectives", "ntp + niptp"], 'Did you mean "nitp"'),
        (["--objectives", "nitp(traget_layer=1)"], 'Did you mean "target_layer"'),
        (["--objectives", "ntp + nitp(target_layer=3)"], "target_layer is 3"),
        (["--objectives", "ntp +"], "ntp +"),
        (["--dim", "17"], "dim is 17"),
        (["--dim", "many"], "--dim"),
        (["--steps", "0"], "--steps"),
        (["--warmup", "1.5"], "--warmup"),
        (["--nonsense"], "--nonsense"),
        (["--context", "100000"], "too short"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(text, tmp_path, capsys, more, said):
    assert pretrain.main(arguments(text, tmp_path / "out", *more)) == 2
    assert said in complaint(capsys)
    assert not (tmp_path / "out").exists()


def test_every_problem_of_a_spec_gets_a_line_of_its_own(text, tmp_path, capsys):
    assert pretrain.main(arguments(text, tmp_path, "--objectives", "ntp(z_los=1) + niptp")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("pretrain: ") for line in lines)


def test_bad_input_shows_no_traceback_to_a_shell(tmp_path):
    (tmp_path / "empty.txt").touch()
    done = subprocess.run(
        [sys.executable, SCRIPT, "--data", tmp_path / "empty.txt"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("pretrain: ") and len(done.stderr.splitlines()) == 1
