"""One process for each folder of results."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .failure import BadInput


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Inside the context no other process passes here with the same folder.

    The lock is the operating system's: it ends with the process, however that ends; the empty file
    stays.

    Raises:
        BadInput: another process is inside.
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInput(
                f"{folder}: another process works there; wait for it or choose another --out"
            ) from error
        yield
