"""The corpus of the pretraining example: what is text, what is held out, which window comes when."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.console import failure
from experiments.train import data, schedule


@settings(deadline=None, max_examples=30)
@given(
    texts=st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=8),
    context=st.integers(2, 7),
)
def test_every_token_carries_the_number_of_its_document(texts, context):
    windows = data.Windows.of(texts, context)
    ids, documents = windows.take(torch.arange(len(windows)))
    stream = [(byte, number) for number, text in enumerate(texts) for byte in text]
    cut = [
        stream[start : start + context]
        for start in range(0, len(stream) // context * context, context)
    ]
    # a window of one-byte documents alone has nothing to predict
    whole = [
        pair for window in cut if len({number for _, number in window}) < context for pair in window
    ]
    assert list(zip(ids.flatten().tolist(), documents.flatten().tolist(), strict=True)) == whole


@settings(deadline=None, max_examples=30)
@given(
    windows=st.integers(1, 20), seed=st.integers(0, 9), cuts=st.lists(st.integers(1, 9), max_size=8)
)
def test_the_order_does_not_depend_on_how_it_is_asked_for(windows, seed, cuts):
    whole = data.Order(windows, seed).at(0, sum(cuts))
    order, pieces = data.Order(windows, seed), []
    for count in cuts:
        pieces += order.at(len(pieces), count).tolist()
    assert pieces == whole.tolist()


def test_every_epoch_visits_every_window_once_in_a_new_order():
    order = data.Order(50, seed=0)
    first, second = order.at(0, 50).tolist(), order.at(50, 50).tolist()
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert data.Order(50, seed=1).at(0, 50).tolist() != first


def test_of_many_documents_every_twentieth_is_held_out_whole():
    texts = [bytes([number]) * 3 for number in range(45)]
    train, held_out = data.split(texts)
    assert held_out == [texts[10], texts[30]]
    assert sorted(train + held_out) == texts


def test_of_few_documents_the_last_twentieth_of_each_is_held_out():
    texts = [b"a" * 100, b"b" * 40, b"c"]
    assert data.split(texts) == ([b"a" * 95, b"b" * 38, b"c"], [b"a" * 5, b"b" * 2])


def test_the_default_corpus_is_the_library_without_tests_and_installed_packages(
    tmp_path, monkeypatch
):
    for name in [
        "b.py",
        "a.py",
        "sub/c.py",
        "test/d.py",
        "sub/tests/e.py",
        "site-packages/f.py",
        "notes.txt",
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(data.sysconfig, "get_path", lambda _: str(tmp_path))
    assert data.read_documents(None).texts == [b"a.py", b"b.py", b"sub/c.py"]


def test_the_default_corpus_is_here_and_the_same_each_time():
    one, other = (data.load_corpus(None, 64, 16) for _ in range(2))
    assert one.fingerprint == other.fingerprint and torch.equal(
        one.train.tokens, other.train.tokens
    )
    assert len(one.train.tokens) > 10 * len(one.held_out.tokens) > 1_000_000


def test_a_directory_gives_its_text_in_sorted_order_and_counts_what_it_skips(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "empty").touch()
    (tmp_path / ".hidden").write_text("never")
    documents = data.read_documents(tmp_path)
    assert documents.texts == [b"first", b"second"]
    assert documents.skipped == ["image.png (binary, not text (a NUL byte at offset 4))"]


def test_whatever_is_left_out_of_a_directory_is_named(tmp_path, monkeypatch):
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/a.txt").write_text("never seen")
    (tmp_path / "locked.txt").write_text("never read")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "self").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    scandir, read_bytes = os.scandir, Path.read_bytes

    def forbidden(function, name):
        """The permissions of a user, whoever runs the tests."""

        def guarded(path):
            if Path(path).name == name:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return function(path)

        return guarded

    monkeypatch.setattr(os, "scandir", forbidden(scandir, "secret"))
    monkeypatch.setattr(Path, "read_bytes", forbidden(read_bytes, "locked.txt"))
    documents = data.read_documents(tmp_path)
    assert documents.texts == [b"text"]
    assert documents.skipped == [
        "gone (No such file or directory)",
        "locked.txt (Permission denied)",
        "loop (Too many levels of symbolic links)",
        "pipe (not a regular file)",
        "secret (Permission denied)",
        "self (a link to a folder)",
    ]
    (tmp_path / "good.txt").write_text("text and so on. " * 50)
    said = data.load_corpus(tmp_path, 4, 1).description
    assert (
        "6 skipped: gone (No such file or directory), locked.txt (Permission denied), loop ("
        in said
    )
    assert "and 3 more; held out" in said
    (tmp_path / "good.txt").unlink()
    with pytest.raises(
        failure.BadInput, match="none of them non-empty UTF-8 text; 6 skipped: gone"
    ):
        data.load_corpus(tmp_path, 4, 1)


def test_a_folder_whose_every_part_is_forbidden_says_so(tmp_path, monkeypatch):
    def forbidden(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(failure.BadInput, match=r"no files; 1 skipped: \. \(Permission denied\)"):
        data.load_corpus(tmp_path, 4, 1)


def _no_text(folder: Path, name: str) -> Path:
    path = folder / name
    if name == "empty.txt":
        path.touch()
    elif name == "nul.bin":
        path.write_bytes(b"text" * 100 + b"\0")
    elif name == "latin.txt":
        path.write_bytes("café".encode("latin-1") * 100)
    elif name == "folder":
        path.mkdir()
    elif name == "binaries":
        path.mkdir()
        (path / "a.bin").write_bytes(b"\0")
    elif name == "pipe":
        os.mkfifo(path)
    elif name == "single bytes":
        path.mkdir()
        for number in range(200):
            (path / str(number)).write_text("x")
    elif name == "short.txt":
        path.write_text("too short")
    return path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.txt", "no such file or directory"),
        ("empty.txt", "the file is empty"),
        ("nul.bin", "NUL byte at offset 400"),
        ("latin.txt", "not UTF-8 text (offset 3"),
        ("folder", "no files"),
        ("binaries", "1 files, none of them"),
        ("pipe", "neither a file nor a directory"),
        ("single bytes", "every file is one byte, none has a next byte to predict"),
        ("short.txt", "9 bytes are too short"),
    ],
)
def test_what_is_no_text_is_refused_in_one_line_that_names_it(tmp_path, name, said):
    path = _no_text(tmp_path, name)
    with pytest.raises(failure.BadInput) as caught:
        data.load_corpus(path, 32, 4)
    message = str(caught.value)
    assert message.startswith(str(path)) and said in message and "\n" not in message


def test_a_text_that_memory_does_not_hold_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "huge.txt").write_text("text")

    def full(_):
        raise MemoryError

    monkeypatch.setattr(Path, "read_bytes", full)
    for path in (tmp_path / "huge.txt", tmp_path, None):
        with pytest.raises(
            failure.BadInput, match="the text does not fit into memory; --data takes less text"
        ):
            data.load_corpus(path, 32, 4)


@settings(deadline=None, max_examples=50)
@given(steps=st.integers(1, 300), warmup=st.floats(0, 1), decay=st.floats(0, 1))
def test_the_rate_is_never_zero_never_above_its_peak_and_jumps_nowhere(steps, warmup, decay):
    rates = [schedule.warmup_stable_decay(step, steps, 2.0, warmup, decay) for step in range(steps)]
    assert all(0 < rate <= 2.0 for rate in rates)
    steepest = 2.0 / max(1.0, warmup * steps) + 2.0 / max(1.0, decay * steps)
    assert all(abs(b - a) <= steepest + 1e-12 for a, b in itertools.pairwise(rates))


def test_the_rate_warms_up_stays_and_decays():
    rates = [schedule.warmup_stable_decay(step, 100, 1.0, 0.1, 0.2) for step in range(100)]
    assert (
        rates[0] == pytest.approx(0.1)
        and rates[9:80] == [1.0] * 71
        and rates[99] == pytest.approx(0.05)
    )
