"""Files of the pretraining example: whole or absent, resumable, and without the projector when
exported."""

from __future__ import annotations

import errno
import os

import pytest
import safetensors.torch
import torch

from experiments.console import failure
from experiments.train import checkpoint, model


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, moment):
    path = tmp_path / "checkpoint.pt"
    checkpoint.write_whole(path, b"old")
    monkeypatch.setattr(checkpoint.os, moment, full_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        checkpoint.write_whole(path, b"new")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    weights = torch.randn(3)
    rest = dict.fromkeys(checkpoint.STATE_KEYS - {"model"}, 0) | {"spec": {"ntp": {"weight": 1.0}}}
    checkpoint.save_checkpoint(tmp_path / "c.pt", rest | {"model": {"w": weights}})
    loaded = checkpoint.load_checkpoint(tmp_path / "c.pt")
    assert torch.equal(loaded.pop("model")["w"], weights) and loaded == rest


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "pickle"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "c.pt"
    checkpoint.save_checkpoint(path, dict.fromkeys(checkpoint.STATE_KEYS, torch.zeros(1000)))
    content = {
        "cut": path.read_bytes()[:700],
        "empty": b"",
        "pickle": b"cos\nsystem\n(S'true'\ntR.",
    }.get(damage)
    if content is None:
        torch.save({"weights": 1}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(failure.BadInput) as caught:
        checkpoint.load_checkpoint(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_table_drops_the_rows_of_steps_that_are_taken_again(tmp_path):
    table = checkpoint.Table(tmp_path / "t.csv", 0)
    table.begin()
    for step in range(5):
        table.add({"step": step, "loss": step / 3})
    again = checkpoint.Table(tmp_path / "t.csv", 3)
    again.begin()
    again.add({"step": 3, "loss": 9.0})
    rows = checkpoint.read_table(tmp_path / "t.csv")
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert float(rows[2]["loss"]) == 2 / 3 and rows[3]["loss"] == "9.0"


def test_a_row_cut_short_by_a_crash_is_left_out(tmp_path):
    (tmp_path / "t.csv").write_text("step,loss,seconds\n0,1.5,0.1\n1,1.")
    assert checkpoint.read_table(tmp_path / "t.csv") == [
        {"step": "0", "loss": "1.5", "seconds": "0.1"}
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe\xff\n", "can't decode"),
        (b"step,loss\r\n0,1.5\r\n1,one\r\n", "could not convert"),
        (b"step,loss\r\n0\r\n1,1.5\r\n", "row 1 has not the columns of the header"),
        (b"step,loss\r\n0,1.5,9\r\n", "row 1 has not the columns of the header"),
        (b"a,b\r\n1,2\r\n", "row 1 has not the columns of the header"),
        (b"step,loss\r\n0,\0\0\r\n", ""),
    ],
)
def test_a_damaged_table_is_refused_by_name_and_left_alone(tmp_path, content, said):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(failure.BadInput) as caught:
        checkpoint.Table(path, 1)
    message = str(caught.value)
    assert message.startswith(f"{path}: damaged (") and said in message and "\n" not in message
    assert path.read_bytes() == content


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save_checkpoint(
        path, dict.fromkeys(checkpoint.STATE_KEYS, 0) | {"model": {"w": torch.randn(4)}}
    )
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 17), *range(len(whole) - 80, len(whole))]:
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]
        )
        with pytest.raises(failure.BadInput):
            checkpoint.load_checkpoint(path)


def test_every_flipped_bit_and_every_cut_of_exported_weights_is_noticed(tmp_path):
    path = tmp_path / "m.safetensors"
    config = model.ModelConfig(
        vocab_size=5, dim=4, layers=1, heads=1, kv_heads=1, context=6, tied=True
    )
    net = model.Decoder(config, seed=5)
    checkpoint.export_weights(path, net)
    whole = path.read_bytes()
    for place in range(0, len(whole), 17):
        flipped = whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]
        for content in (flipped, whole[:place]):
            path.write_bytes(content)
            try:
                found = checkpoint.load_weights(path)
            except failure.BadInput as error:
                assert str(error).startswith(str(path)) and "\n" not in str(error)
                continue
            # JSON allows for it: a space that became another space, the order of keys
            assert found.config == config
            assert all(
                torch.equal(a, b) for a, b in zip(found.parameters(), net.parameters(), strict=True)
            )


@pytest.mark.parametrize("tied", [False, True])
def test_exported_weights_rebuild_the_plain_model(tmp_path, tied):
    config = model.ModelConfig(
        vocab_size=13, dim=8, layers=2, heads=2, kv_heads=1, context=6, tied=tied
    )
    net = model.Decoder(config, seed=5)
    checkpoint.export_weights(tmp_path / "m.safetensors", net)
    rebuilt = checkpoint.load_weights(tmp_path / "m.safetensors")
    ids = torch.arange(6)[None]
    assert rebuilt.config == config
    assert torch.equal(rebuilt.lm_head(rebuilt(ids).last_hidden), net.lm_head(net(ids).last_hidden))
    assert safetensors.torch.load_file(tmp_path / "m.safetensors").keys() == net.state_dict().keys()
