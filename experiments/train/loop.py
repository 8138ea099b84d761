"""The loop around the steps: tables, validations, checkpoints, signals, a full disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable

from experiments.console.failure import Failure, Interrupted
from experiments.console.interrupt import Stop
from nitp_ops.core.files import UNFINISHED

from .checkpoint import Table, export_weights, save_checkpoint, stored_checkpoint
from .evaluate import HeldOut, evaluate
from .heads import export_heads
from .run import Run


def prepare(run: Run, resume: bool) -> str:
    """Restore the run or give it an empty folder; says which.

    A folder from an earlier start is kept beside the new one until the next start.
    """
    if resume and stored_checkpoint(run.checkpoint) is not None:
        run.restore()
        for left_behind in run.folder.glob(f".*{UNFINISHED}"):
            left_behind.unlink()
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


def train(
    run: Run, on_step: Callable[[dict[str, float]], None], on_look: Callable[[HeldOut], None]
) -> HeldOut:
    """Take the steps that remain; the last look at held-out text.

    Raises:
        Interrupted: a signal; the state is saved.
        BadInput: a table beside the checkpoint is damaged.
        Failure: the disk refused a write, or the loss is not finite; the last checkpoint is intact.
    """
    saved = run.done
    try:
        steps, looks = tables = [
            Table(run.folder / name, run.done, run.tables.get(name))
            for name in ("steps.csv", "validation.csv")
        ]
        for table in tables:
            table.begin()
        with Stop().wait() as stop:
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
                if last or stop.number or run.done % run.options.checkpoint_every == 0:
                    _save(run, steps, looks)
                    saved = run.done
                if stop.number:
                    raise _interrupted(run, stop.number)
            final = evaluate(run)
            looks.add(final.row())
            on_look(final)
            export_weights(run.folder / "model.safetensors", run.model)
            if run.options.keep_heads:
                export_heads(run.folder / "heads.safetensors", run.objective)
            if stop.number:
                raise _interrupted(run, stop.number)
        return final
    except OSError as error:
        kept = (
            f"the checkpoint of step {saved} is intact"
            if saved
            else "no checkpoint was written yet"
        )
        raise Failure(
            f"{error.filename or run.folder}: {error.strerror or error}; {kept}; make it "
            "writable, then use --resume"
        ) from error


def _save(run: Run, *tables: Table) -> None:
    for table in tables:
        table.sync()
    run.tables = {table.path.name: table.digest for table in tables}
    save_checkpoint(run.checkpoint, run.state())


def _interrupted(run: Run, number: int) -> Interrupted:
    done = f"stopped after step {run.done} of {run.options.steps}, saved in {run.checkpoint}"
    return Interrupted(f"{run.name}: {done}", number)
