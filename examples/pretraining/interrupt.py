"""Ctrl-C before there is anything to save. Standard library only: it must be there before torch is."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def until_loaded(program: str) -> Iterator[None]:
    """Inside the context (the import of torch takes seconds) Ctrl-C ends the process with one line and code 130."""

    def stop(*_: object) -> None:
        # Not an exception: half-imported extension modules turn a KeyboardInterrupt into errors of their own.
        os.write(sys.stderr.fileno(), f"{program}: stopped before anything began\n".encode())
        os._exit(130)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
