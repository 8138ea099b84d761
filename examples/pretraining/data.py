"""Text as bytes: find it, refuse what is not text, hold some of it out, cut it into windows."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .failure import BadInput

VOCAB_SIZE = 256
HELD_OUT_EVERY = 20
# Directories of the standard library that hold test data or installed packages.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Documents:
    """Texts with their origin, in a fixed order; none is empty."""

    texts: list[bytes]
    origin: str
    skipped: int
    """Files of a directory that are not UTF-8 text."""


@dataclass(frozen=True)
class Windows:
    """A token stream cut into windows of `context` tokens; the tail that fills no window is left out."""

    tokens: torch.Tensor
    """[N] uint8, the documents one after the other."""
    ends: torch.Tensor
    """[documents] int64, where each document ends in `tokens`."""
    context: int

    @classmethod
    def of(cls, texts: list[bytes], context: int) -> Windows:
        tokens = torch.frombuffer(bytearray(b"".join(texts) or b"\0"), dtype=torch.uint8)
        lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64)
        return cls(tokens[: int(lengths.sum())], lengths.cumsum(0), context)

    def __len__(self) -> int:
        return len(self.tokens) // self.context

    def take(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """token_ids and document_ids, both [len(indices), context] int64."""
        position = indices[:, None] * self.context + torch.arange(self.context)
        return self.tokens[position].long(), torch.searchsorted(self.ends, position, right=True)


class Order:
    """Which window comes at which position of training: a new permutation each epoch, from the seed alone."""

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
                self._epoch, self._permutation = epoch, torch.randperm(self.windows, generator=generator)
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
    """Read `path` (a file, a directory; None: the sources of Python's standard library) and split it.

    With at least 20 documents every 20th is held out, else the last twentieth of each.

    Args:
        path: where the text is.
        context: tokens a window.
        needed: training windows that one step takes.

    Raises:
        BadInput: no text there, text that is not UTF-8, or too little of it.
    """
    documents = read_documents(path)
    train, held_out = split(documents.texts)
    corpus_bytes = sum(map(len, documents.texts))
    windows, validation = Windows.of(train, context), Windows.of(held_out, context)
    if len(windows) < needed or len(validation) < 2:
        raise BadInput(
            f"{documents.origin}: {corpus_bytes} bytes are too short: {len(windows)} training and "
            f"{len(validation)} held-out windows of --context {context}, expected at least {needed} and 2; "
            "give more text or lower --context, --batch or --accumulate"
        )
    digest = hashlib.sha256(b"".join(len(t).to_bytes(8, "little") + t for t in documents.texts))
    plural = "" if len(documents.texts) == 1 else "s"
    skipped = f", {documents.skipped} skipped (not UTF-8 text)" if documents.skipped else ""
    description = (
        f"{documents.origin}: {len(documents.texts):,} file{plural}, {corpus_bytes / 1e6:.2f} MB{skipped}; "
        f"held out {len(validation.tokens) / 1e6:.2f} MB"
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
        return _read_directory(library, list(_library_sources(library)), "Python's standard library")
    if path.is_dir():
        visible = (p for p in path.rglob("*") if not _hidden(p.relative_to(path)) and p.is_file())
        return _read_directory(path, sorted(visible), str(path))
    if not path.exists():
        raise BadInput(f"{path}: no such file or directory; --data takes a text file or a directory of them")
    if not path.is_file():
        raise BadInput(f"{path}: neither a file nor a directory; --data takes text files")
    text = _read(path)
    if not text:
        raise BadInput(f"{path}: the file is empty; --data takes a text file or a directory of them")
    if (flaw := not_text(text)) is not None:
        raise BadInput(f"{path}: {flaw}; --data takes UTF-8 text")
    return Documents([text], str(path), 0)


def not_text(content: bytes) -> str | None:
    """Why these bytes are not UTF-8 text, or None when they are."""
    if (at := content.find(b"\0")) >= 0:
        return f"binary, not text (a NUL byte at offset {at})"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8 text (offset {error.start}: {error.reason})"
    return None


def _read_directory(folder: Path, files: list[Path], origin: str) -> Documents:
    contents = [content for file in files if (content := _read(file))]
    texts = [content for content in contents if not_text(content) is None]
    if not texts:
        found = f"{len(files)} files, none of them non-empty UTF-8 text" if files else "no files"
        raise BadInput(f"{folder}: {found}; --data takes a text file or a directory of them")
    return Documents(texts, origin, len(contents) - len(texts))


def _library_sources(library: Path) -> Iterator[Path]:
    for file in sorted(library.rglob("*.py")):
        if not NOT_LIBRARY.intersection(file.relative_to(library).parts):
            yield file


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
