"""The link of the portable wheel: one library for every Linux with glibc >= 2.28, whatever compiled
its objects.

The linker and the glibc to link against are zig's (PyPI ziglang). libstdc++ and libgcc_s stay
shared: with copies of its own in the library an exception that a kernel throws would end the
process instead of arriving in torch. Only what a compiler always links from libgcc.a is taken from
there: the detection of the processor's features (zig has none)."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

MACHINES = ("x86_64", "aarch64")
GLIBC = "2.28"  # torch's own
#: What g++ >= 11 reads of a glibc later than that: whether the process has one thread. It has more.
SINGLE_THREADED = '__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;\n'


def tag(machine: str) -> tuple[str, str, str]:
    """Python, ABI and platform of the wheel: without the module _C any Python 3 will do."""
    return "py3", "none", f"manylinux_{GLIBC.replace('.', '_')}_{machine}"


def unusable(machine: str, compiler: Sequence[str]) -> str | None:
    """Why a portable library cannot be linked here, or None."""
    if machine not in MACHINES:
        return f"a portable library is for {' or '.join(MACHINES)}, got {machine}"
    if importlib.util.find_spec("ziglang") is None:
        return (
            "a portable library is linked by ziglang, which is not installed (pip install ziglang)"
        )
    absent = [
        name
        for name in ("libgcc.a", "libstdc++.so.6", "libgcc_s.so.1")
        if not runtime(compiler, name).is_absolute()
    ]
    return f"{compiler[-1]} finds no {' and no '.join(absent)}" if absent else None


def cross_compiler(machine: str) -> list[str] | None:
    """The compiler for a machine that is not this one; None for this one."""
    return None if machine == platform.machine() else [f"{machine}-linux-gnu-g++"]


def runtime(compiler: Sequence[str], name: str) -> Path:
    """Where the compiler takes a shared library from; the bare name where it has none."""
    command = [*compiler, f"-print-file-name={name}"]
    path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return path.resolve() if path.is_absolute() else path


def linker(machine: str, compiler: Sequence[str], work: Path) -> tuple[list[str], list[Path]]:
    """The command that links, and what it links beside the objects."""
    source, single_threaded = work / "single_threaded.c", work / "single_threaded.o"
    source.write_text(SINGLE_THREADED)
    subprocess.run(
        [*compiler, "-x", "c", "-fPIC", "-c", str(source), "-o", str(single_threaded)], check=True
    )
    command = [sys.executable, "-m", "ziglang", "cc", "-target", f"{machine}-linux-gnu.{GLIBC}"]
    runtimes = [runtime(compiler, name) for name in ("libgcc.a", "libstdc++.so.6", "libgcc_s.so.1")]
    return command, [single_threaded, *runtimes]
