"""Children forked from a parent that has imported torch and computed nothing.

Each starts with a clean heap, no thread pool, and no import to wait for.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

# Loaded here, once, instead of in every child: the first custom op of a process imports
# torch._dynamo (1 to 2 s), the first compilation the rest.
import torch._dynamo
import torch._inductor.compile_fx

from .isolated import MeasurementError, one_line

T = TypeVar("T")

MALLOC = {
    "default": "glibc as it comes: blocks over 32 MiB are mapped afresh, and every page faults, "
    "at each allocation",
    "raised": "mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1): freed blocks stay mapped",
}
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def in_child(task: Callable[[], T]) -> T:
    """Run `task` in a forked child and return its (picklable) result.

    Raises:
        MeasurementError: the task raised, or the child died.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(task, sender))
    child.start()
    sender.close()
    try:
        succeeded, result = receiver.recv()
    except EOFError:
        child.join()
        raise MeasurementError(
            f"the process ended with code {child.exitcode} before it had a result"
        ) from None
    finally:
        receiver.close()
    child.join()
    if not succeeded:
        raise MeasurementError(result)
    return result


def _send(task: Callable[[], Any], sender: Connection) -> None:
    # Ctrl-C reaches parent and child alike; the parent is the one that says so.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        sender.send((True, task()))
    except Exception as error:
        sender.send((False, one_line(error)))


def configure(threads: int, malloc: str = "default") -> None:
    """Threads and allocator of this process."""
    torch.set_num_threads(threads)
    if malloc == "raised":
        libc = ctypes.CDLL(None)
        if not (libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1)):
            raise OSError("mallopt refused the setting")
