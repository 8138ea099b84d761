"""Text as bytes: find it, refuse what is not text, hold some of it out, cut it into windows."""

from __future__ import annotations

import hashlib
import os
import stat
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.console.failure import BadInput

VOCAB_SIZE = 256
HELD_OUT_EVERY = 20
# Files and folders left out that a description names; the others it counts.
NAMED = 3
# Directories of the standard library that hold test data or installed packages.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Documents:
    """Texts with their origin, in a fixed order; none is empty."""

    texts: list[bytes]
    origin: str
    skipped: list[str]
    """What was left out of a directory and why, a text each: no UTF-8 text, not readable, no file."""


@dataclass(frozen=True)
class Windows:
    """A token stream cut into windows of `context` tokens.

    Left out: the tail that fills no window, and windows of one-byte documents alone, which have no
    next token.
    """

    tokens: torch.Tensor
    """[N] uint8, the documents one after the other."""
    ends: torch.Tensor
    """[documents] int64, where each document ends in `tokens`."""
    context: int
    starts: torch.Tensor
    """[windows] int64, where each window begins in `tokens`."""

    @classmethod
    def of(cls, texts: list[bytes], context: int) -> Windows:
        tokens = torch.frombuffer(bytearray(b"".join(texts) or b"\0"), dtype=torch.uint8)
        lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64)
        ends = lengths.cumsum(0)
        starts = torch.arange(int(lengths.sum()) // context) * context
        # A document that ends inside a window takes one of its context - 1 pairs of neighbours.
        inner = torch.searchsorted(ends, starts + context, right=False) - torch.searchsorted(
            ends, starts, right=True
        )
        return cls(tokens[: int(lengths.sum())], ends, context, starts[inner < context - 1])

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """token_ids and document_ids, both [len(indices), context] int64."""
        position = self.starts[indices, None] + torch.arange(self.context)
        return self.tokens[position].long(), torch.searchsorted(self.ends, position, right=True)


class Order:
    """Which window comes at which position of training: a new permutation each epoch, from the seed
    alone."""

    def __init__(self, windows: int, seed: int) -> None:
        self.windows, self.seed = windows, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def at(self, position: int, count: int) -> torch.Tensor:
        """Window indices at positions [position, position + count)."""
        chosen = torch.empty(count, dtype=torch.int64)
        for index in range(count):
            epoch, place = divmod(position + index, self.windows)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                self._epoch, self._permutation = (
                    epoch,
                    torch.randperm(self.windows, generator=generator),
                )
            chosen[index] = self._permutation[place]
        return chosen


@dataclass(frozen=True)
class Corpus:
    """Training and held-out windows of one body of text."""

    train: Windows
    held_out: Windows
    description: str
    fingerprint: str
    """Names the text: the first 16 hex digits of its sha256, document borders included."""


def load_corpus(path: Path | None, context: int, needed: int) -> Corpus:
    """Read `path` (a file, a directory; None: the sources of Python's standard library) and split
    it.

    With at least 20 documents every 20th is held out, else the last twentieth of each.

    Args:
        path: where the text is.
        context: tokens a window.
        needed: training windows that one step takes.

    Raises:
        BadInput: no text there, text that is not UTF-8, too little of it, or more than memory
            holds.
    """
    try:
        return _load(path, context, needed)
    except MemoryError as error:
        where = path or "Python's standard library"
        raise BadInput(
            f"{where}: the text does not fit into memory; --data takes less text"
        ) from error


def _load(path: Path | None, context: int, needed: int) -> Corpus:
    documents = read_documents(path)
    train, held_out = split(documents.texts)
    corpus_bytes = sum(map(len, documents.texts))
    windows, validation = Windows.of(train, context), Windows.of(held_out, context)
    if len(documents.texts) == sum(map(len, documents.texts)):
        raise BadInput(
            f"{documents.origin}: every file is one byte, none has a next byte to predict; --data "
            "takes text"
        )
    if len(windows) < needed or len(validation) < 2:
        raise BadInput(
            f"{documents.origin}: {corpus_bytes} bytes are too short: {len(windows)} training and "
            f"{len(validation)} held-out windows of --context {context}, expected at least "
            f"{needed} and 2; give more text or lower --context, --batch or --accumulate"
        )
    digest = hashlib.sha256(b"".join(len(t).to_bytes(8, "little") + t for t in documents.texts))
    plural = "" if len(documents.texts) == 1 else "s"
    skipped = f", {_listed(documents.skipped)}" if documents.skipped else ""
    description = (
        f"{documents.origin}: {len(documents.texts):,} file{plural}, {corpus_bytes / 1e6:.2f} "
        f"MB{skipped}; held out {len(validation.tokens) / 1e6:.2f} MB"
    )
    return Corpus(windows, validation, description, digest.hexdigest()[:16])


def split(texts: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Training texts and held-out texts; a document split in two is two documents."""
    if len(texts) >= HELD_OUT_EVERY:
        middle = HELD_OUT_EVERY // 2
        train = [text for index, text in enumerate(texts) if index % HELD_OUT_EVERY != middle]
        return train, texts[middle::HELD_OUT_EVERY]
    cuts = [len(text) - len(text) // HELD_OUT_EVERY for text in texts]
    tails = [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
    heads = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
    return heads, [tail for tail in tails if tail]


def read_documents(path: Path | None) -> Documents:
    """The non-empty texts of a file, of a directory, or (None) of the standard library."""
    if path is None:
        library = Path(sysconfig.get_path("stdlib"))
        return _read_directory(library, "Python's standard library", _library_source)
    if path.is_dir():
        return _read_directory(path, str(path), lambda relative: True)
    if not path.exists():
        raise BadInput(
            f"{path}: no such file or directory; --data takes a text file or a directory of them"
        )
    if not path.is_file():
        raise BadInput(f"{path}: neither a file nor a directory; --data takes text files")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    if not text:
        raise BadInput(
            f"{path}: the file is empty; --data takes a text file or a directory of them"
        )
    if (flaw := not_text(text)) is not None:
        raise BadInput(f"{path}: {flaw}; --data takes UTF-8 text")
    return Documents([text], str(path), [])


def not_text(content: bytes) -> str | None:
    """Why these bytes are not UTF-8 text, or None when they are."""
    if (at := content.find(b"\0")) >= 0:
        return f"binary, not text (a NUL byte at offset {at})"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8 text (offset {error.start}: {error.reason})"
    return None


def _read_directory(folder: Path, origin: str, wanted: Callable[[Path], bool]) -> Documents:
    """The texts below `folder` in the order of their paths; nothing hidden, no linked folder."""
    skipped: dict[Path, str] = {}
    files: list[Path] = []

    def unreadable(error: OSError) -> None:
        skipped[Path(error.filename)] = str(error.strerror)

    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if (link := Path(parent, name)).is_symlink():
                skipped[link] = "a link to a folder"
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    files = sorted(file for file in files if wanted(file.relative_to(folder)))
    texts = []
    for file in files:
        try:
            content = _content(file)
            flaw = not_text(content)
        except OSError as error:
            content, flaw = b"", str(error.strerror)
        if flaw is not None:
            skipped[file] = flaw
        elif content:
            texts.append(content)
    reasons = [f"{path.relative_to(folder)} ({why})" for path, why in sorted(skipped.items())]
    if not texts:
        found = f"{len(files)} files, none of them non-empty UTF-8 text" if files else "no files"
        left_out = f"; {_listed(reasons)}" if reasons else ""
        raise BadInput(
            f"{folder}: {found}{left_out}; --data takes a text file or a directory of them"
        )
    return Documents(texts, origin, reasons)


def _content(file: Path) -> bytes:
    """All of a file.

    Raises:
        OSError: it is gone, not readable or not a regular file: to open a pipe would wait for its
            writer.
    """
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError(0, "not a regular file")
    return file.read_bytes()


def _listed(skipped: list[str]) -> str:
    more = f" and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
    return f"{len(skipped)} skipped: {', '.join(skipped[:NAMED])}{more}"


def _library_source(relative: Path) -> bool:
    return relative.suffix == ".py" and not NOT_LIBRARY.intersection(relative.parts)
