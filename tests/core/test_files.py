"""Files that the library writes: whole or absent, whatever else writes them; damaged ones are named,
never used."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import __main__ as benchmarks
from benchmarks.report import readme, storage
from nitp_ops.attaching import sidecar
from nitp_ops.core.files import write_whole
from nitp_ops.objectives import ModelInfo, build

INFO = ModelInfo(hidden_size=4, vocab_size=8, num_layers=4)


def objective(value: float):
    made = build("ntp + nitp", model=INFO)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(value)
    return made


def values(made) -> set[float]:
    return {value for parameter in made.parameters() for value in parameter.flatten().tolist()}


WRITERS = {
    "write_whole": (
        lambda folder, value: write_whole(folder / "a", str(value).encode() * 999),
        "a",
    ),
    "sidecar": (lambda folder, value: sidecar.save(objective(value), folder), sidecar.FILE),
    "benchmarks": (
        lambda folder, value: storage.write(folder / "a.json", str(value) * 999),
        "a.json",
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_of_two_writers_of_one_file_one_wins_whole(tmp_path: Path, monkeypatch, name: str):
    write, file = WRITERS[name]
    write(tmp_path, 1)
    alone = (tmp_path / file).read_bytes()
    replace, begun = os.replace, []

    def interleaved(source, target):
        """Just before the first renames its file the second writes all of its own."""
        if not begun:
            begun.append(source)
            write(tmp_path, 2)
        replace(source, target)

    monkeypatch.setattr(os, "replace", interleaved)
    monkeypatch.setattr(Path, "replace", lambda source, target: interleaved(source, target))
    write(tmp_path, 1)
    assert begun and os.listdir(tmp_path) == [file]
    if name == "sidecar":  # safetensors writes its metadata in any order
        read = objective(0)
        sidecar.load(read, tmp_path)
        assert values(read) == {1.0}
    else:
        assert (tmp_path / file).read_bytes() == alone


def test_a_full_disk_leaves_the_old_sidecar_and_nothing_else(tmp_path: Path, monkeypatch):
    path = sidecar.save(objective(1), tmp_path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        sidecar.save(objective(2), tmp_path)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_no_flipped_bit_and_no_cut_of_a_sidecar_is_loaded(tmp_path: Path):
    path = sidecar.save(objective(1.5), tmp_path)
    whole = path.read_bytes()
    read = objective(0)
    for place in [*range(0, len(whole), 97), len(whole) - 1]:
        for content in (
            whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :],
            whole[:place],
        ):
            path.write_bytes(content)
            with pytest.raises(
                ValueError,
                match=r"^load: [^\n]*nitp_objective.safetensors "
                r"[^\n]*$",
            ):
                sidecar.load(read, tmp_path)
            assert values(read) == {0.0}
    path.write_bytes(whole)
    sidecar.load(read, tmp_path)
    assert values(read) == {1.5}


def test_a_sidecar_of_an_earlier_version_has_no_checksum_and_loads(tmp_path: Path):
    path = sidecar.save(objective(1.5), tmp_path)
    spec = json.dumps(objective(0).spec.to_dict())
    save_file(load_file(path), path, metadata={"format": "pt", "spec": spec})
    read = objective(0)
    sidecar.load(read, tmp_path)
    assert values(read) == {1.5}


@pytest.mark.parametrize(
    "content", [b"", b'{"machine": {"da', b"[]", b'{"machine\xff": 1}', b'{"other": 1}']
)
def test_damaged_results_of_benchmarks_are_one_line(
    tmp_path: Path, monkeypatch, capsys, content: bytes
):
    monkeypatch.setattr(storage, "RESULTS", tmp_path)
    (tmp_path / "machine").mkdir()
    for kind in ("quick", "scaling"):
        (tmp_path / "machine" / f"abc-{kind}.json").write_bytes(content)
    before = readme.README.read_bytes()
    assert benchmarks.main(["plot"]) == 1 and readme.main() == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("not readable results (" in line for line in lines)
    assert readme.README.read_bytes() == before and storage.newest("-none") is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_benchmarks_as_ctrl_c_does(monkeypatch, capsys, number):
    handler = signal.signal(
        number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    )
    cleaned = []

    def listing():
        try:
            signal.raise_signal(number)
        finally:
            cleaned.append(number)
        return "cases"

    try:
        monkeypatch.setattr(benchmarks, "listing", listing)
        assert benchmarks.main(["--list"]) == 128 + number
        assert cleaned and capsys.readouterr().err == "benchmarks: interrupted, nothing written\n"
        signal.signal(number, signal.SIG_IGN)  # as nohup leaves SIGHUP
        if number != signal.SIGINT:
            assert benchmarks.main(["--list"]) == 0 and signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, handler)
