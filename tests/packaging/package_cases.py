"""Real virtual environments, the sources as a repository of their own, and wheels built from them.

An environment gets torch by links to torch's own files and those of what it requires: nothing else
of this one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SITE = Path(str(metadata.distribution("torch").locate_file("")))
#: Every build compiles the same sources under the same names: the second takes its objects from the
#: cache.
COMPILER = {"CXX": "ccache g++"} if shutil.which("ccache") else {}

GRADIENT = """
import torch, nitp_ops
hidden = torch.randn(4, 8, requires_grad=True)
nitp_ops.linear_cross_entropy(hidden, torch.randn(16, 8), torch.arange(4){extra}).backward()
print("objectives", nitp_ops.objectives.__name__, "gradient", bool(hidden.grad.abs().sum() > 0))
"""
COMPILED = """
import nitp_ops
from nitp_ops.core import library
print("compiled", library.load_error is None, nitp_ops.__file__)
"""


def run(
    *command: str | Path, cwd: Path, check: bool = True, **extra: str
) -> subprocess.CompletedProcess[str]:
    """The command in an environment without this one's folders; its output is shown where it fails."""
    hidden = (
        "PYTHONPATH",
        "VIRTUAL_ENV",
        "CONDA_PREFIX",
        "NITP_OPS_PURE",
        "NITP_CUDA_ARCHITECTURES",
        "MAKEFLAGS",
        "MAKELEVEL",
    )
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | COMPILER | extra
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def path_without(folder: Path, *hidden: str) -> str:
    """A PATH of one folder, which holds links to all programs but those named."""
    bin = folder / "bin"
    bin.mkdir(parents=True)
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).iterdir() if Path(place).is_dir() else ():
            if program.name not in hidden and not (bin / program.name).is_symlink():
                (bin / program.name).symlink_to(program)
    return str(bin)


def program(folder: Path, name: str, script: str) -> Path:
    """An executable shell script."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


def required(names: list[str]) -> set[str]:
    """The distributions that these ones require, and so on, as their metadata says; "name[extra]"
    is one too."""
    found: set[str] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        for extra in ("", *requirement.extras):
            told = f"{requirement.name.lower().replace('_', '-')}[{extra}]"
            if told in found:
                continue
            found.add(told)
            for line in metadata.requires(requirement.name) or ():
                deeper = Requirement(line)
                here = {**default_environment(), "extra": extra}
                if deeper.marker is None or deeper.marker.evaluate(here):
                    waiting.append(deeper)
    return {name.partition("[")[0] for name in found}


def environment(folder: Path, *names: str) -> Path:
    """The Python of a clean virtual environment that holds these distributions and what they
    require."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    site = next(folder.glob("lib/python*/site-packages"))
    for name in required(list(names)) - {"nitp-ops"}:
        for file in metadata.files(name) or ():
            first, target = file.parts[0], site / file.parts[0]
            if first not in ("..", "__pycache__") and not target.exists():
                target.symlink_to(file.locate().__fspath__()[: -len(str(file))] + first)
    return folder / "bin/python"


def install(python: Path, *what: str | Path, cwd: Path, check: bool = True, **extra: str):
    """pip install into the environment of `python`; torch is never fetched."""
    command = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", *what)
    return run(*command, cwd=cwd, check=check, **extra)


def compiled(python: Path, cwd: Path) -> bool:
    """Whether the package of that environment has its compiled kernels, and computes a gradient
    with them."""
    told = run(python, "-c", COMPILED, cwd=cwd).stdout
    answer = run(python, "-c", GRADIENT.format(extra=""), cwd=cwd).stdout
    assert answer == "objectives nitp_ops.objectives gradient True\n" or "compiled False" in told
    return "compiled True" in told


def sources(folder: Path) -> Path:
    """The files of the repository, without anything built in place, as a repository with one
    commit."""
    clone = folder / "a clone"  # nothing may break at the space
    listed = run(
        "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes((ROOT / name).read_bytes())
            (clone / name).chmod((ROOT / name).stat().st_mode)
    who = ("-c", "user.name=tests", "-c", "user.email=tests@example.com")
    run("git", "init", "-q", cwd=clone)
    run("git", "add", "-A", cwd=clone)
    run("git", *who, "commit", "-q", "-m", "sources", cwd=clone)
    return clone
