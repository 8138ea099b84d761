"""Files that are whole or absent, whenever a process ends and whatever else writes; checksums of
tensors."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

#: Of the neighbour that is written first; one that a killed process left behind is stale.
UNFINISHED = ".partial"


def write_whole(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Write a neighbour file, fsync it, rename it over `path`: at any moment `path` is an old or a
    new whole.

    Of several processes that write the same path one wins, whole: each has a neighbour of its own.

    Args:
        path: the file.
        content: all of it.
        keep: where the file that is there now goes; between the two renames only `keep` exists.

    Raises:
        OSError: the disk is full or not writable; `path` is as it was.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{UNFINISHED}")
    try:
        with open(unfinished, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(unfinished, path)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink()
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def checksum(tensors: Mapping[str, Tensor], about: str) -> str:
    """sha256 of names, dtypes, shapes and values, and of a text that belongs to them.

    Example:
        >>> one, other = torch.zeros(2), torch.zeros(2, 1)
        >>> checksum({"a": one}, "") == checksum({"a": other}, "")
        False
    """
    found = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
