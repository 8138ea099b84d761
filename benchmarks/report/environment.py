"""The machine, the software and the commit that numbers were measured on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def machine(threads: int) -> dict[str, Any]:
    """CPU, instruction set, cores, threads, torch, commit."""
    return {
        "cpu": processor(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def gpu_machine(known_commit: str | None) -> dict[str, Any]:
    """GPU, its size, versions, commit (given where the tree is a copy without its history)."""
    properties = torch.cuda.get_device_properties(0)
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": properties.total_memory / 2**30,
        "capability": f"{properties.major}.{properties.minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": triton,
        "commit": known_commit or commit(),
    }


def here(device: str) -> dict[str, Any]:
    """The machine of this process, as it is set up."""
    return gpu_machine(None) if device == "cuda" else machine(torch.get_num_threads())


def machine_line(info: dict[str, Any]) -> str:
    """The line that heads every output."""
    if "gpu" in info:
        return (
            f"{info['gpu']} ({info['multiprocessors']} multiprocessors, {info['memory_gib']:.0f} "
            f"GiB), torch {info['torch']}, CUDA {info['cuda']}, Triton {info['triton']}, commit "
            f"{info['commit']}"
        )
    return (
        f"{info['cpu']} ({info['instruction_set']}), {info['cores']} cores, {info['threads']} "
        f"threads, torch {info['torch']}, commit {info['commit']}"
    )


def processor() -> str:
    """The name that the CPU gives itself."""
    try:
        match = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
    except OSError:  # not Linux
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def commit() -> str:
    """HEAD's first twelve digits, "-dirty" behind them where tracked files differ."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "--verify", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except OSError:
        return "unknown"
    if not head:
        return "uncommitted"
    return f"{head}-dirty" if changed else head
