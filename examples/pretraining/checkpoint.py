"""Files that are either whole or absent: checkpoints, exported weights, tables of steps."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from .failure import BadInput
from .model import Decoder, ModelConfig

STATE_KEYS = {"step", "position", "spec", "options", "corpus", "model", "objective", "optimizer", "rng"}


def write_whole(path: Path, content: bytes) -> None:
    """Write a neighbour file, fsync it, rename it over `path`: at any moment `path` is the old or the new.

    Raises:
        OSError: the disk is full or not writable; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        error.filename = str(path)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Store tensors and plain containers."""
    # In memory first: torch's zip writer turns a full disk into a RuntimeError that names no file.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that `save_checkpoint` stored, on the CPU.

    Raises:
        BadInput: the file is damaged or is no checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise BadInput(f"{path}: not a readable checkpoint; remove it or choose another --out") from error
    if not isinstance(state, dict) or not STATE_KEYS.issubset(state):
        raise BadInput(f"{path}: not a checkpoint of this script; remove it or choose another --out")
    return state


def export_weights(path: Path, model: Decoder) -> None:
    """The plain model as safetensors, its shapes in the metadata; nothing of the objective is in it."""
    # Clones, because safetensors refuses tensors that share storage, as tied embeddings do.
    weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    metadata = {"config": json.dumps(asdict(model.config))}
    write_whole(path, safetensors.torch.save(weights, metadata=metadata))


def load_weights(path: Path) -> Decoder:
    """The model that `export_weights` stored."""
    with safetensors.safe_open(path, framework="pt") as file:
        config = ModelConfig(**json.loads(file.metadata()["config"]))
    model = Decoder(config)
    model.load_state_dict(safetensors.torch.load_file(path))
    return model


class Table:
    """A CSV file that grows by a row; the header is the first row's keys, the first column is the step.

    Args:
        path: the file.
        first_step: rows of this step and later ones, left by an interrupted process, are dropped.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        kept = [row for row in read_table(path) if int(row["step"]) < first_step]
        text = io.StringIO()
        if kept:
            writer = csv.DictWriter(text, list(kept[0]))
            writer.writeheader()
            writer.writerows(kept)
        write_whole(path, text.getvalue().encode())
        self._columns = list(kept[0]) if kept else None

    def add(self, row: dict[str, Any]) -> None:
        """Append one row."""
        header = self._columns is None
        self._columns = self._columns or list(row)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            if header:
                writer.writeheader()
            writer.writerow(row)

    def sync(self) -> None:
        """Put the rows on the disk."""
        with open(self.path, "a", encoding="utf-8") as file:
            os.fsync(file.fileno())


def read_table(path: Path) -> list[dict[str, str]]:
    """The whole rows of a CSV file as text; a last row cut short by a crash is left out."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if None not in row.values() and None not in row]
