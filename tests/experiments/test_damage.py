"""Files of the pretraining example that are damaged, and two processes at one folder: one line, and
nothing is lost."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys

import pytest

from examples import pretrain
from experiments.analysis import records
from experiments.console import failure
from tests.experiments.pretrain_cases import (
    ROOT,
    arguments,
    assert_same_run,
    checkpoint,
    complaint,
)

NTP = ("--objectives", "ntp")


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    """One objective, 20 steps without a stop."""
    out = tmp_path_factory.mktemp("straight")
    assert pretrain.main(arguments(text, out, *NTP)) == 0
    return out


@pytest.fixture
def run(straight, tmp_path):
    """A copy of its folder."""
    shutil.copytree(straight, tmp_path / "out")
    return tmp_path / "out" / "ntp"


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def in_tensors(path):
    """A place inside the first weight of a checkpoint."""
    weights = checkpoint.load_checkpoint(path)["model"]
    return path.read_bytes().index(next(iter(weights.values())).numpy().tobytes()) + 100


def resume(text, run):
    return pretrain.main(arguments(text, run.parent, *NTP, "--resume"))


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_flipped_bit_in_a_checkpoint_is_refused_and_the_one_before_it_goes_on(
    text, straight, run, capsys
):
    flip(run / "checkpoint.pt", in_tensors(run / "checkpoint.pt"))
    before = everything(run)
    assert resume(text, run) == 2
    line = complaint(capsys)
    assert "checkpoint.pt: damaged, its checksum does not match" in line
    assert "checkpoint.previous.pt is whole: remove the damaged file to go on from step 15" in line
    assert everything(run) == before
    (run / "checkpoint.pt").unlink()
    assert resume(text, run) == 0
    assert_same_run(run, straight / "ntp")


def test_without_a_good_one_before_it_a_damaged_checkpoint_is_only_named(text, run, capsys):
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        flip(run / name, in_tensors(run / name))
    assert resume(text, run) == 2
    assert complaint(capsys).endswith(
        "damaged, its checksum does not match; remove it or choose another --out"
    )


def test_a_damaged_table_is_named_and_the_run_goes_on_without_it(text, straight, run, capsys):
    for name, damage in (
        ("steps.csv", b"step,loss\r\n0,1.5\r\n1,one\r\n"),
        ("validation.csv", b"\xff\xfe\xff\n"),
    ):
        (run / name).write_bytes(damage)
        assert resume(text, run) == 2
        line = complaint(capsys)
        assert f"{run / name}: damaged (" in line and "move it away to go on without" in line
        assert (run / name).read_bytes() == damage
        (run / name).unlink()
    assert resume(text, run) == 0
    assert (run / "model.safetensors").read_bytes() == (
        straight / "ntp" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("name", ["steps.csv", "validation.csv"])
def test_a_digit_that_changed_in_a_table_is_noticed(text, run, capsys, name):
    content = (run / name).read_bytes()
    place = content.index(b".", content.index(b"\n")) + 1
    # d becomes 9 - d
    (run / name).write_bytes(content[:place] + bytes([105 - content[place]]) + content[place + 1 :])
    assert resume(text, run) == 2
    assert "its rows before step 20 are not those of the checkpoint" in complaint(capsys)


def test_a_folder_in_the_place_of_a_file_and_a_file_in_the_place_of_a_folder(
    text, run, tmp_path, capsys
):
    (run / "checkpoint.pt").unlink()
    (run / "checkpoint.pt").mkdir()
    assert resume(text, run) == 2
    assert "checkpoint.pt: cannot be read (Is a directory)" in complaint(capsys)
    (tmp_path / "file").touch()
    assert pretrain.main(arguments(text, tmp_path / "file", *NTP)) == 1
    assert complaint(capsys) == f"pretrain: {tmp_path / 'file'}: File exists; choose another --out"


def test_a_second_process_at_the_same_folder_is_refused(text, run, capsys):
    before = everything(run)
    with open(run.parent / ".lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for more in (["--resume"], []):
            assert pretrain.main(arguments(text, run.parent, *NTP, *more)) == 2
            assert complaint(capsys).endswith(
                "out: another process works there; wait for it or choose another --out"
            )
    assert everything(run) == before
    assert resume(text, run) == 0  # the file of the lock alone keeps nobody out


def test_a_killed_process_leaves_no_lock_and_its_half_file_is_removed(text, run):
    lock = "from experiments.console.lock import alone_in; import os, pathlib, sys"
    die = f"{lock}\nwith alone_in(pathlib.Path(sys.argv[1])):\n os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", die, run.parent], cwd=ROOT)
    assert done.returncode == -9
    (run / ".checkpoint.pt.1-ab.partial").write_bytes(b"half")
    assert resume(text, run) == 0
    assert not list(run.glob(".*"))


def test_records_name_the_damaged_line(tmp_path):
    path = tmp_path / "r.jsonl"
    file = records.Records(path, {"lr": 0.1})
    file.add(arm="a", value=1.5)
    file.add(arm="b", value=2.5)
    good = path.read_bytes()
    for number, line in enumerate(good.splitlines(), start=1):
        bad = line.replace(b"0.1", b"0.3").replace(b"1.5", b"1.7").replace(b"2.5", b"\xff.5")
        path.write_bytes(good.replace(line, bad))
        with pytest.raises(failure.BadInput, match=f"line {number}"):
            records.Records(path, {"lr": 0.1})
        assert path.read_bytes() == good.replace(line, bad)
    unsigned = [
        {k: v for k, v in json.loads(line).items() if k != "sha256"} for line in good.splitlines()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in unsigned))
    assert [line["arm"] for line in records.Records(path, {"lr": 0.1}).lines] == ["a", "b"]
