"""Files that are either whole or absent: checkpoints, exported weights, tables of steps."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from experiments.console.failure import BadInput
from nitp_ops.core.files import checksum, write_whole

from .model import Decoder, ModelConfig

STATE_KEYS = {
    "step",
    "position",
    "spec",
    "options",
    "corpus",
    "tables",
    "model",
    "objective",
    "optimizer",
    "rng",
}
SEAL = b"sha256:"
METADATA = "nitp_ops"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Store tensors and plain containers with a checksum; the checkpoint before it stays as
    `previous_of(path)`."""
    # In memory first: torch's zip writer turns a full disk into a RuntimeError that names no file.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    write_whole(path, _sealed(content), keep=previous_of(path))


def _sealed(archive: bytes) -> bytes:
    """With a checksum, since torch.load checks none: as the comment of the zip archive, which is
    its end."""
    seal = SEAL + hashlib.sha256(archive).hexdigest().encode()
    return archive[:-2] + len(seal).to_bytes(2, "little") + seal


def previous_of(path: Path) -> Path:
    """Where the checkpoint before the last one is."""
    return path.with_suffix(f".previous{path.suffix}")


def stored_checkpoint(path: Path) -> Path | None:
    """The last checkpoint, or the one before it where only that is there; None where there is
    neither."""
    return next((each for each in (path, previous_of(path)) if each.exists()), None)


def remove_checkpoints(path: Path) -> None:
    """Remove both."""
    for each in (path, previous_of(path)):
        each.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that `save_checkpoint` stored, on the CPU.

    Raises:
        BadInput: the file is damaged or is no checkpoint; names the checkpoint before it, where
            that is whole.
    """
    try:
        return _unsealed(path)
    except BadInput as error:
        previous = previous_of(path)
        try:
            step = _unsealed(previous)["step"]
        except BadInput:
            raise BadInput(f"{error}; remove it or choose another --out") from error
        raise BadInput(
            f"{error}; {previous} is whole: remove the damaged file to go on from step {step}"
        ) from error


def _unsealed(path: Path) -> dict[str, Any]:
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    content = stored.rpartition(SEAL)[0][:-2] + bytes(2)
    if len(content) == 2:
        raise BadInput(f"{path}: cut short, or not a checkpoint of this version of the script")
    if _sealed(content) != stored:
        raise BadInput(f"{path}: damaged, its checksum does not match")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise BadInput(f"{path}: not a readable checkpoint") from error
    if not isinstance(state, dict) or not STATE_KEYS.issubset(state):
        raise BadInput(f"{path}: not a checkpoint of this version of the script")
    return state


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Tensors as safetensors; in the metadata `about` as JSON, with a checksum of all of it."""
    # Clones, because safetensors refuses tensors that share storage, as tied embeddings do.
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    stamped = {"about": about, "sha256": checksum(own, json.dumps(about))}
    # One key: safetensors writes several in any order, and equal weights are to be equal files.
    write_whole(path, safetensors.torch.save(own, metadata={METADATA: json.dumps(stamped)}))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What `write_tensors` stored: the tensors, and `about`.

    Raises:
        BadInput: the file is damaged or another one.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            stamped = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise BadInput(
            f"{path}: not readable ({' '.join(str(error).split())}); export it again"
        ) from error
    if not {"about", "sha256"} <= stamped.keys():
        raise BadInput(
            f"{path}: not exported by this version of examples/pretrain.py; export it again"
        )
    if checksum(tensors, json.dumps(stamped["about"])) != stamped["sha256"]:
        raise BadInput(f"{path}: damaged, its checksum does not match; export it again")
    return tensors, stamped["about"]


def export_weights(path: Path, model: Decoder) -> None:
    """The plain model as safetensors, its shapes in the metadata; nothing of the objective is in
    it."""
    write_tensors(path, model.state_dict(), {"config": asdict(model.config)})


def load_weights(path: Path) -> Decoder:
    """The model that `export_weights` stored."""
    weights, about = read_tensors(path)
    model = Decoder(ModelConfig(**about["config"]))
    model.load_state_dict(weights)
    return model


class Table:
    """A CSV file that grows by a row; the header is the first row's keys, the first column is the
    step.

    Args:
        path: the file.
        first_step: rows of this step and later ones, left by an interrupted process, are dropped.
        digest: of the rows before `first_step`, as the checkpoint has it; None where there is no
            checkpoint.

    Raises:
        BadInput: the file is damaged. One that is missing is begun anew.
    """

    def __init__(self, path: Path, first_step: int, digest: str | None = None) -> None:
        self.path = path
        rows = read_table(path)
        kept = [row for row in rows if int(row["step"]) < first_step]
        self._columns = list(kept[0]) if kept else None
        text = io.StringIO()
        if kept:
            writer = csv.DictWriter(text, list(kept[0]))
            writer.writeheader()
            writer.writerows(kept)
        self._kept = text.getvalue().encode()
        self._sha256 = hashlib.sha256(self._kept)
        begun_anew = not path.exists() or (rows and not kept)
        if digest not in (None, self.digest) and not begun_anew:
            raise damaged(
                path, f"its rows before step {first_step} are not those of the checkpoint"
            )

    def begin(self) -> None:
        """Drop the later rows from the file."""
        write_whole(self.path, self._kept)

    @property
    def digest(self) -> str:
        """Of everything in the file."""
        return self._sha256.hexdigest()

    def add(self, row: dict[str, Any]) -> None:
        """Append one row."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns or list(row))
        if self._columns is None:
            writer.writeheader()
            self._columns = list(row)
        writer.writerow(row)
        content = text.getvalue().encode()
        with open(self.path, "ab") as file:
            file.write(content)
        self._sha256.update(content)

    def sync(self) -> None:
        """Put the rows on the disk."""
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())


def read_table(path: Path) -> list[dict[str, str]]:
    """The whole rows of a CSV file as text; a last row cut short by a crash is left out.

    Raises:
        BadInput: the file is damaged: a row is no row of numbers.
    """
    if not path.exists():
        return []
    try:
        whole, end, _ = path.read_bytes().decode("utf-8").rpartition("\n")
        rows = list(csv.DictReader(io.StringIO(whole + end, newline="")))
        for number, row in enumerate(rows, start=1):
            if None in row or None in row.values() or "step" not in row:
                raise ValueError(f"row {number} has not the columns of the header")
            int(row["step"])
            _ = [float(value) for value in row.values()]
    except (ValueError, csv.Error) as error:
        raise damaged(path, str(error)) from error
    return rows


def damaged(path: Path, reason: str) -> BadInput:
    """Says what is wrong with a table, and that the run can do without it."""
    return BadInput(
        f"{path}: damaged ({reason}); move it away to go on without the rows that it has"
    )
