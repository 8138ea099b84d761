"""From the ends of a command to its exit code: one clear line each, no traceback."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path

import torch

from nitp_ops import BackendError
from nitp_ops.objectives import SpecError

from .failure import BadInput, Failure, Interrupted
from .interrupt import StoppedAtOnce, on_signals, stop_at_once
from .output import Output

ALLOCATOR = "can't allocate memory"
"""PyTorch's words for a MemoryError on the CPU, in a RuntimeError."""


def guarded(program: str, work: Callable[[], None], resume: str | None) -> int:
    """Do the work; the exit code.

    Args:
        program: the name before each complaint.
        work: what to do.
        resume: the option that continues after Ctrl-C; None where the same command continues.
    """

    def complain(*lines: str, code: int) -> int:
        # A terminal that hung up takes no line; the exit code still says it.
        with suppress(OSError):
            for line in lines:
                print(f"{program}: {line}", file=sys.stderr, flush=True)
        return code

    output = Output(sys.stdout)
    try:
        with redirect_stdout(output), on_signals(stop_at_once):  # type: ignore[type-var]
            work()
    except SpecError as error:
        return complain(*error.problems, code=BadInput.exit_code)
    except Interrupted as error:
        return complain(f"{error}; continue with: {_again(resume)}", code=error.exit_code)
    except Failure as error:
        return complain(str(error), code=error.exit_code)
    except BackendError as error:
        return complain(" ".join(str(error).split()), code=Failure.exit_code)
    except OSError as error:
        reason = (
            f"{error.filename}: {error.strerror}; choose another --out"
            if error.filename
            else str(error)
        )
        return complain(reason, code=Failure.exit_code)
    except StoppedAtOnce as error:
        again = f"stopped at once; the last checkpoint continues with: {_again(resume)}"
        return complain(again, code=128 + error.number)
    except (MemoryError, RuntimeError) as error:
        if not (
            isinstance(error, (MemoryError, torch.OutOfMemoryError)) or ALLOCATOR in str(error)
        ):
            raise
        return complain("out of memory; lower --batch, --context or --dim", code=Failure.exit_code)
    if output.failure is not None:
        lost = f"standard output: {output.failure.strerror}: what was printed after that is lost, every file is written"
        return complain(lost, code=Failure.exit_code)
    return 0


def command_line() -> str:
    """The command of this process, as a shell takes it."""
    return shlex.join([Path(sys.executable).name, *sys.argv])


def _again(resume: str | None) -> str:
    return command_line() if resume is None or resume in sys.argv else f"{command_line()} {resume}"
