"""Signals that end a program: Ctrl-C, SIGTERM, SIGHUP. Standard library only: it must be there
before torch is."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Handler = Callable[[int, FrameType | None], object]


class StoppedAtOnce(KeyboardInterrupt):
    """A signal that does not wait for the end of a step."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def stop_at_once(number: int, _: FrameType | None) -> NoReturn:
    """The handler that raises."""
    raise StoppedAtOnce(number)


@contextmanager
def on_signals(handler: Handler) -> Iterator[None]:
    """Inside the context `handler` gets the signals. Ignored ones stay ignored: nohup and shells
    ask for that."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heeded = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in heeded:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in heeded.items():
            signal.signal(number, old)


class Stop:
    """What the first signal inside `wait` leaves behind; the second one raises StoppedAtOnce."""

    def __init__(self) -> None:
        self.number = 0
        """Of the signal; 0 until there is one."""

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            stop_at_once(number, frame)
        self.number = number

    @contextmanager
    def wait(self) -> Iterator[Stop]:
        """The context in which a signal waits for the end of a step."""
        with on_signals(self._note):
            yield self


@contextmanager
def until_loaded(program: str) -> Iterator[None]:
    """Inside the context, in which a program imports what it needs, what goes wrong is one line.

    The import of torch takes seconds: a signal ends the process with code 128 + its number. A
    package that is not installed ends it with 1, and what to install."""

    def stop(number: int, _: FrameType | None) -> None:
        # Not an exception: half-imported extension modules turn a KeyboardInterrupt into errors of
        # their own.
        try:
            os.write(sys.stderr.fileno(), f"{program}: stopped before anything began\n".encode())
        finally:
            os._exit(128 + number)

    with on_signals(stop):
        try:
            yield
        except ModuleNotFoundError as absent:
            if str(absent.name).startswith("experiments"):
                raise
            sys.exit(f'{program}: {absent.name} is not installed: pip install "nitp_ops[examples]"')
