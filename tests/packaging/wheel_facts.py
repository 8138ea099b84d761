"""What a portable wheel's library needs and offers, and what a wheel that anybody may install must
not be."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

MB = 1e6
#: Of the wheel, in bytes.
LARGEST = {"cpu": 3 * MB, "cuda": 6 * MB}
RUNTIMES = {"libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6"}
RUNTIMES |= {
    "libdl.so.2",
    "librt.so.1",
    "libpthread.so.0",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}
DECLARED = (Path(__file__).parents[2] / "csrc/torch_abi.h").read_text()


class Facts(NamedTuple):
    """size: of the wheel; policy: the (glibc, machine) that auditwheel finds it to need, torch
    aside."""

    size: int
    kind: str
    tag: str
    machine: str
    needed: frozenset[str]
    exported: frozenset[str]
    undefined: frozenset[str]
    policy: tuple[int, int]
    purelib: str
    python_modules: frozenset[str]


def read(wheel: Path) -> Facts:
    """Facts of a wheel, by readelf and auditwheel."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as files:
        library = files.extract("nitp_ops/libnitp_ops.so", folder)
        names = files.namelist()
        (written,) = (
            files.read(name).decode() for name in names if name.endswith(".dist-info/WHEEL")
        )
        (bill,) = (json.loads(files.read(name)) for name in names if ".dist-info/sboms/" in name)
        dynamic = _told("readelf", "-dW", library)
        symbols = [
            line.split() for line in _told("readelf", "--dyn-syms", "-W", library).splitlines()
        ]
        machine = re.findall(r"Machine:\s+(.+)", _told("readelf", "-hW", library))[0]
    rows = [row for row in symbols if len(row) >= 8 and row[0].rstrip(":").isdigit()]
    return Facts(
        size=wheel.stat().st_size,
        kind="cuda" if bill["components"] else "cpu",
        tag=re.findall(r"^Tag: (.+)$", written, re.MULTILINE)[0],
        machine="aarch64" if machine == "AArch64" else "x86_64",
        needed=frozenset(re.findall(r"Shared library: \[(.+?)\]", dynamic)),
        exported=frozenset(row[7].partition("@")[0] for row in rows if row[6] != "UND"),
        undefined=frozenset(row[7].partition("@")[0] for row in rows if row[6] == "UND"),
        policy=policy(wheel),
        purelib=re.findall(r"^Root-Is-Purelib: (.+)$", written, re.MULTILINE)[0],
        python_modules=frozenset(name for name in names if re.search(r"/_C\b", name)),
    )


def policy(wheel: Path) -> tuple[int, int]:
    """The oldest glibc that auditwheel finds the library to run on; torch's library, which no
    policy knows, aside."""
    told = _told(sys.executable, "-m", "auditwheel", "show", wheel)
    text = " ".join(told.split())
    found = re.search(r"constrains the platform tag to \"manylinux_(\d+)_(\d+)_\w+\"", text)
    if found is None:
        raise ValueError(f"auditwheel names no policy for {wheel.name}: {text}")
    return int(found[1]), int(found[2])


def faults(facts: Facts) -> list[str]:
    """Why the wheel may not be published, one reason an entry."""
    torch = {name for name in facts.undefined if "torch" in name}
    checks = {
        f"{facts.size / MB:.2f} MB, at most {LARGEST[facts.kind] / MB:.0f}": facts.size
        <= LARGEST[facts.kind],
        f"tag {facts.tag}": facts.tag == f"py3-none-manylinux_2_28_{facts.machine}",
        f"Root-Is-Purelib is {facts.purelib}": facts.purelib == "false",
        f"holds {sorted(facts.python_modules)}": not facts.python_modules,
        f"needs glibc {facts.policy}": facts.policy <= (2, 28),
        f"needs {sorted(facts.needed - RUNTIMES)}": facts.needed <= RUNTIMES,
        "does not need torch's library and a shared C++ runtime": facts.needed
        >= {"libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1"},
        f"exports {sorted(facts.exported)}": all(
            name.startswith("nitp_ops_") for name in facts.exported
        ),
        "exports nothing": bool(facts.exported),
        f"calls {sorted(torch)} of torch": all(
            re.search(rf"\b{name}\(", DECLARED) for name in torch
        ),
        "takes names of CUDA or OpenMP when it loads": not any(
            re.match(r"cuda|cu[A-Z]|GOMP|omp_|nv", name) for name in facts.undefined
        ),
    }
    return [reason for reason, holds in checks.items() if not holds]


def _told(*command: str | Path) -> str:
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=True
    ).stdout
