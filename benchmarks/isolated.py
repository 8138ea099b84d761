"""Fresh processes for code that may crash: one that dies, hangs or breaks the device costs its own row only."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from .measure import MeasurementError, one_line

#: Seconds that a process may take to start: torch and its compiler are imported in it.
START = 120.0
#: Called with the name whose code runs next, None for code that is nobody's.
At = Callable[[str | None], None]
Task = Callable[[At, list[str]], Any]


class Lost(RuntimeError):
    """The name that runs has left the device unusable: the rest starts again in another process."""


def without_the_dead(
    task: Task, names: Sequence[str], *, patience: float, deadline: float
) -> tuple[Any, dict[str, str]]:
    """(result, reason by name): the result of `task(at, names)` for the names that let it finish.

    task: picklable; it runs in a new process, again without the name under which it died, fell silent for `patience`
    seconds, or raised `Lost`. deadline: of `time.monotonic`, when nothing is waited for any longer.

    Raises:
        MeasurementError: it failed under no name, or the deadline passed.
    """
    reasons: dict[str, str] = {}
    while True:
        left = [name for name in names if name not in reasons]
        name, kind, value = _run(task, left, patience, deadline)
        if kind == "done":
            return value, reasons
        if name is None or time.monotonic() >= deadline:
            raise MeasurementError(value if name is None else f"{name}: {value}")
        reasons[name] = value


def _run(task: Task, names: list[str], patience: float, deadline: float) -> tuple[str | None, str, Any]:
    """(name that ran last, "done" | "failed", result or reason)."""
    # not from a fork server with torch in it: importing inductor asks for devices, after which no fork may use one
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(task, names, sender))
    child.start()
    sender.close()
    name, allowed = None, START
    try:
        while True:
            wait = min(allowed, deadline - time.monotonic())
            if wait <= 0 or not receiver.poll(wait):
                child.kill()
                return name, "failed", f"stopped: no answer within {max(0.0, wait):.0f} s"
            kind, value = receiver.recv()
            if kind != "at":
                return name, kind, value
            name, allowed = value, patience
    except EOFError:
        child.join()
        return name, "failed", f"the process ended with code {child.exitcode} before it had a result"
    finally:
        receiver.close()
        child.join(5)
        if child.is_alive():
            child.kill()
            child.join()


def _child(task: Task, names: list[str], sender: Connection) -> None:
    sender.send(("at", None))
    try:
        sender.send(("done", task(lambda name: sender.send(("at", name)), names)))
    except Exception as error:
        sender.send(("failed", str(error) if isinstance(error, Lost) else one_line(error)))
