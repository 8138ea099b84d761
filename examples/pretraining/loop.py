"""The loop around the steps: tables, validations, checkpoints, Ctrl-C, a full disk."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from types import FrameType

from .checkpoint import Table, export_weights, save_checkpoint
from .evaluate import HeldOut, evaluate
from .failure import Failure, Interrupted
from .heads import export_heads
from .run import Run


class CtrlC:
    """Inside the context the first Ctrl-C only sets `pressed`; the second acts at once."""

    def __init__(self) -> None:
        self.pressed = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __enter__(self) -> CtrlC:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)


def prepare(run: Run, resume: bool) -> str:
    """Restore the run or give it an empty folder; says which.

    A folder from an earlier start is kept beside the new one until the next start.
    """
    if resume and run.checkpoint.exists():
        run.restore()
        return f"{run.name}: continues at step {run.done} of {run.options.steps}"
    earlier = run.folder.with_name(run.folder.name + ".previous")
    note = ""
    if run.folder.exists():
        if earlier.exists():
            shutil.rmtree(earlier)
        run.folder.rename(earlier)
        note = f" (the earlier one is now {earlier})"
    run.folder.mkdir(parents=True)
    return f"{run.name}: starts in {run.folder}{note}"


def train(run: Run, on_step: Callable[[dict[str, float]], None], on_look: Callable[[HeldOut], None]) -> HeldOut:
    """Take the steps that remain; the last look at held-out text.

    Raises:
        Interrupted: Ctrl-C; the state is saved.
        Failure: the disk refused a write, or the loss is not finite; the last checkpoint is intact.
    """
    saved = run.done
    try:
        steps, looks = Table(run.folder / "steps.csv", run.done), Table(run.folder / "validation.csv", run.done)
        with CtrlC() as ctrl_c:
            while run.done < run.options.steps:
                if run.done % run.options.eval_every == 0:
                    looks.add((look := evaluate(run)).row())
                    on_look(look)
                start = time.perf_counter()
                row = run.step()
                row["seconds"] = time.perf_counter() - start
                steps.add(row)
                on_step(row)
                last = run.done == run.options.steps
                if last or ctrl_c.pressed or run.done % run.options.checkpoint_every == 0:
                    _save(run, steps, looks)
                    saved = run.done
                if ctrl_c.pressed:
                    raise _interrupted(run)
            final = evaluate(run)
            looks.add(final.row())
            on_look(final)
            export_weights(run.folder / "model.safetensors", run.model)
            if run.options.keep_heads:
                export_heads(run.folder / "heads.safetensors", run.objective)
            if ctrl_c.pressed:
                raise _interrupted(run)
        return final
    except OSError as error:
        kept = f"the checkpoint of step {saved} is intact" if saved else "no checkpoint was written yet"
        raise Failure(
            f"{error.filename or run.folder}: {error.strerror or error}; {kept}; make it writable, then use --resume"
        ) from error


def _save(run: Run, *tables: Table) -> None:
    for table in tables:
        table.sync()
    save_checkpoint(run.checkpoint, run.state())


def _interrupted(run: Run) -> Interrupted:
    return Interrupted(f"{run.name}: stopped after step {run.done} of {run.options.steps}, saved in {run.checkpoint}")
