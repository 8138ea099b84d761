"""The machine and the software that numbers were measured on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import nitp_ops
from nitp_ops.core import library
from nitp_ops.kernels import select

ROOT = Path(__file__).resolve().parents[2]


def machine_line(device: str) -> str:
    """Processor, cores, threads, device, versions: one line of facts."""
    threads = torch.get_num_threads()
    facts = [
        processor(),
        f"{os.cpu_count()} cores",
        f"{threads} threads" if threads > 1 else "1 thread",
        torch.cuda.get_device_name() if device == "cuda" else "no GPU used",
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"nitp_ops {nitp_ops.__version__}",
        f"row kernels {_kernels()}",
    ]
    return ", ".join(facts)


def processor() -> str:
    """The name that the CPU gives itself."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of this checkout, with a note where its files were changed; "no known commit" outside one."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    try:
        name = git("rev-parse", "--short=12", "--verify", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except OSError:
        name, changed = "", ""
    if not name:
        return "no known commit"
    return f"commit {name} with local changes" if changed else f"commit {name}"


def _kernels() -> str:
    if select.load_error is not None:
        return "none"
    return library.instruction_set()
