"""Processes for code that may crash: a name that dies, hangs or breaks the device costs its own row
only.

Nothing heavy is imported here: a process imports what its first task needs.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

#: Seconds that a process may take to start: torch and its compiler are imported in it.
START = 120.0
#: Called with the name whose code runs next, None for code that is nobody's.
At = Callable[[str | None], None]
Task = Callable[[At, list[str]], Any]


class MeasurementError(RuntimeError):
    """A child failed; the message is one line."""


class Lost(RuntimeError):
    """The name that runs has left the device unusable: the rest starts again in another process."""


def one_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:200]


class Isolated:
    """A process that runs tasks one after the other; it starts with the first task, and again after
    a failure."""

    def __init__(self) -> None:
        self._child: Any = None
        self._pipe: Connection | None = None
        self._over = False

    def __enter__(self) -> Isolated:
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True  # for a thread that still asks
        self.close()

    def run(
        self, task: Task, names: Sequence[str], *, patience: float, deadline: float
    ) -> tuple[Any, dict[str, str]]:
        """(result, reason by name): the result of `task(at, names)` for the names that let it
        finish.

        task: picklable; it runs again, in a new process, without the name under which it died, fell
            silent for
        `patience` seconds, or raised. deadline: of `time.monotonic`, when nothing is waited for any
        longer.

        Raises:
            MeasurementError: it failed under no name, or the deadline passed.
        """
        reasons: dict[str, str] = {}
        while not self._over:
            left = [name for name in names if name not in reasons]
            name, kind, value = self._once(task, left, patience, deadline)
            if kind == "done":
                return value, reasons
            self.close()
            if name is None or time.monotonic() >= deadline:
                raise MeasurementError(value if name is None else f"{name}: {value}")
            reasons[name] = value
        raise MeasurementError("the run is over")

    def start(self) -> None:
        """Start the process, if there is none, without waiting for it."""
        if self._child is not None:
            return
        # not from a fork server with torch in it: importing inductor asks for devices, after which
        # no fork may use one
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # not a daemon: compilers may start their own
        self._child = context.Process(target=_serve, args=(theirs,))
        self._child.start()
        theirs.close()

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._child is None or self._pipe is None:
            return
        self._pipe.close()  # an idle one ends by itself
        self._child.join(0.2)
        if self._child.is_alive():
            self._child.kill()
            self._child.join()
        self._child = self._pipe = None

    def _once(
        self, task: Task, names: list[str], patience: float, deadline: float
    ) -> tuple[str | None, str, Any]:
        """(name that ran last, "done" | "failed", result or reason)."""
        self.start()
        child, pipe = self._child, self._pipe
        assert pipe is not None
        name, allowed = None, START
        try:
            pipe.send((task, names))
            while True:
                wait = min(allowed, deadline - time.monotonic())
                if wait <= 0 or not pipe.poll(wait):
                    return name, "failed", f"stopped: no answer within {max(0.0, wait):.0f} s"
                kind, value = pipe.recv()
                if kind != "at":
                    return name, kind, value
                name, allowed = value, START if value is None else patience
        except (EOFError, OSError):
            child.join(5)
            code = child.exitcode
            return name, "failed", f"the process ended with code {code} before it had a result"


def without_the_dead(
    task: Task, names: Sequence[str], *, patience: float, deadline: float
) -> tuple[Any, dict[str, str]]:
    """`Isolated.run` in a process of its own."""
    with Isolated() as process:
        return process.run(task, names, patience=patience, deadline=deadline)


def _serve(pipe: Connection) -> None:
    """Run every task that comes, until the pipe closes."""
    # of a terminal, meant for who started this, who closes the pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, BrokenPipeError):  # who asked is gone
        while True:
            _answer(pipe)


def _answer(pipe: Connection) -> None:
    try:
        task, names = pipe.recv()  # imports what the task is made of
    except EOFError:
        raise
    except Exception as error:
        pipe.send(("failed", one_line(error)))
        return
    try:
        pipe.send(("at", None))
        pipe.send(("done", task(lambda name: pipe.send(("at", name)), names)))
    except Exception as error:
        pipe.send(("failed", str(error) if isinstance(error, Lost) else one_line(error)))
