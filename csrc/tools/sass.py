"""Counts what the loops of a kernel issue for each number, in the machine code that cuobjdump
shows."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

PACK_BYTES = 16


class Loop(NamedTuple):
    """An innermost loop over packs: instructions of its shortest turn, packs that a turn loads and
    stores.

    The shortest turn is the usual one: what a thread does for a new maximum, or for an option, is
    behind a branch.
    """

    instructions: int
    loads: int
    stores: int

    def of_each(self, size: int) -> float:
        """Instructions of a thread for each number of `size` bytes."""
        return self.instructions * size / (PACK_BYTES * max(self.loads, self.stores))


def find_cuobjdump(beside: Path) -> str | None:
    """The program of the PATH, of that folder, or of the Triton that this Python has."""
    triton = importlib.util.find_spec("triton")
    of_triton = [
        Path(folder) / "backends/nvidia/bin"
        for folder in (triton and triton.submodule_search_locations) or []
    ]
    folders = (None, beside, *of_triton)
    return next(
        filter(
            None, (shutil.which("cuobjdump", path=folder and str(folder)) for folder in folders)
        ),
        None,
    )


def loops_of(cuobjdump: str, binary: Path) -> dict[str, list[Loop]]:
    """The loops over packs of every kernel in an object file, by the kernel's mangled name."""
    command = [cuobjdump, "-sass", "-arch", "sm_90", str(binary)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        name: loops(
            [
                (int(at, 16), what)
                for at, what in re.findall(
                    r"/\*([0-9a-f]{4,})\*/ "
                    r"+([^;]*?) *;",
                    code,
                )
            ]
        )
        for name, code in re.findall(r"Function : (\w+)\n(.*?)(?=Function : |\Z)", shown, re.DOTALL)
    }


def loops(code: list[tuple[int, str]]) -> list[Loop]:
    """The innermost loops that load or store packs, in the order of the code: (address,
    instruction) each."""
    jumps = {at: target for at, what in code if (target := _target(what)) is not None}
    back = [(target, at) for at, target in jumps.items() if target < at]
    found = []
    for head, tail in back:
        if any(head <= h and t <= tail for h, t in back if (h, t) != (head, tail)):
            continue
        body = [(at, what) for at, what in code if head <= at <= tail]
        loads = sum(bool(re.search(r"\b(LDG|LDS|LD)\.\S*\b128\b", what)) for _, what in body)
        stores = sum(bool(re.search(r"\b(STG|ST)\.\S*\b128\b", what)) for _, what in body)
        if loads or stores:
            found.append(Loop(_shortest_turn(body, jumps), loads, stores))
    return found


def _target(instruction: str) -> int | None:
    match = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", instruction)
    return int(match[1], 16) if match else None


def _shortest_turn(body: list[tuple[int, str]], jumps: dict[int, int]) -> int:
    """Instructions from the first to the jump back, where branches forward may go either way."""
    index = {at: i for i, (at, _) in enumerate(body)}
    steps = [len(body) + 1] * len(body)
    steps[0] = 1
    for i, (at, what) in enumerate(body[:-1]):
        ways = [] if re.match(r"(BRA|EXIT)\b", what) else [i + 1]
        if at in jumps and index.get(jumps[at], 0) > i:
            ways.append(index[jumps[at]])
        for way in ways:
            steps[way] = min(steps[way], steps[i] + 1)
    return steps[-1]
