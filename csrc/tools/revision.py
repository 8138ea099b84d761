"""The commit of the sources and its time: from git in a clone, from a note in an sdist."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

CSRC = Path(__file__).parents[1]
#: "COMMIT SECONDS", in an sdist alone.
NOTE = CSRC / "revision.txt"


def commit() -> str:
    """The commit; "unknown" without git, or outside of a clone."""
    if NOTE.exists():
        return NOTE.read_text().split()[0]
    return git("describe", "--always", "--dirty", "--abbrev=12") or "unknown"


def seconds() -> str | None:
    """When it was committed, in seconds since 1970; None where it is not known."""
    if NOTE.exists():
        return NOTE.read_text().split()[1]
    return git("log", "-1", "--format=%ct") or None


def git(*command: str) -> str:
    """The output of git in the clone that holds csrc/; "" where there is none, or no git."""
    if shutil.which("git") is None:
        return ""

    def output(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(CSRC), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    # another project's repository may lie around an unpacked archive
    return output(*command) if output("rev-parse", "--show-prefix") == f"{CSRC.name}/" else ""


def note(folder: Path) -> None:
    """Write the note of an sdist."""
    (folder / NOTE.name).unlink(missing_ok=True)  # perhaps a hard link
    (folder / NOTE.name).write_text(f"{commit()} {seconds() or 0}\n")
