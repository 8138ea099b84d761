"""Which nvcc compiles csrc/cuda and how, and the resources of each kernel as the assembler reports
them.

python csrc/tools/build_cuda.py OUT FACTS REPORT...    writes the facts of a build; ninja runs it
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parents[1] / "cuda"
KERNELS = {path.stem: path for path in sorted(FOLDER.glob("**/*.cu"), key=lambda path: path.stem)}
#: Machine code for A100, H100/H200, B200/B300 and RTX 50; others translate the PTX of compute_90 at
#: their first launch. Plain sm_90 and sm_100, not the "a" targets: the code is the same, and it
#: runs on the whole generation.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
#: Compiled for each generation anew: of Hopper's PTX the loops over logits take 7 % more
#: instructions on sm_100, while of its own PTX and of sm_100's sm_120 gets the same code. All other
#: kernels wait for memory, and half of the time of a build goes from sources to PTX.
OVER_LOGITS = ("cross_entropy", "cross_entropy_gradient")
#: Clusters exchange messages by instructions (csrc/cuda/cluster.h) that CUDA has since 12.1.
PROBE = """__global__ void probe(int* x) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%0];" ::"r"(0), "r"(1) : "memory");
#endif
  *x = 1;
}
"""
FLAGS = "-std=c++20 -O3 -Xptxas -v -Xcompiler -fPIC,-fvisibility=hidden"


class Kernel(NamedTuple):
    """What one kernel takes: registers a thread; static shared memory a block, stack and spills a
    thread in bytes."""

    name: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


@functools.cache
def find_nvcc() -> str | None:
    """The nvcc of the PATH, if it compiles a kernel for one of the architectures; else None, after
    the reason."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        if os.environ.get("NITP_CUDA_ARCHITECTURES"):
            raise SystemExit(
                f"nitp_ops: NITP_CUDA_ARCHITECTURES names {', '.join(requested())}, but no nvcc "
                "is on the PATH"
            )
        return None
    reason = unusable(nvcc)
    if reason is None:
        return nvcc
    print(f"nitp_ops: built without CUDA kernels: {nvcc} {reason}", file=sys.stderr, flush=True)
    return None


def unusable(nvcc: str) -> str | None:
    """Why this nvcc cannot build the kernels, or None."""
    try:
        if not architectures(nvcc):
            return f"knows none of {', '.join(requested())} (nvcc >= 12.1 does)"
        with tempfile.TemporaryDirectory() as folder:
            source, compiled = Path(folder) / "probe.cu", Path(folder) / "probe.o"
            source.write_text(PROBE)
            command = [
                nvcc,
                *flags(nvcc, source.stem).split(),
                "-c",
                str(source),
                "-o",
                str(compiled),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            written = compiled.exists()
        if done.returncode or not written:
            lines = [
                line for line in (done.stderr + done.stdout).splitlines() if "error" in line.lower()
            ]
            return f"does not compile a kernel ({lines[0].strip() if lines else 'no message'})"
        libraries(nvcc)
    except OSError as error:
        return f"does not run ({error.strerror})"
    except LookupError as error:
        return str(error.args[0])
    return None


def requested() -> tuple[str, ...]:
    """The requested architectures: all, or those of NITP_CUDA_ARCHITECTURES ("sm_80 sm_90").

    Raises:
        SystemExit: the variable names one that there is no code for.
    """
    names = (
        tuple(os.environ.get("NITP_CUDA_ARCHITECTURES", "").replace(",", " ").split())
        or ARCHITECTURES
    )
    unknown = [name for name in names if name not in ARCHITECTURES]
    if unknown:
        raise SystemExit(
            f"nitp_ops: NITP_CUDA_ARCHITECTURES names {', '.join(unknown)}, expected some of "
            f"{', '.join(ARCHITECTURES)}"
        )
    return names


@functools.cache
def architectures(nvcc: str) -> tuple[str, ...]:
    """The requested architectures that this nvcc knows."""
    known = subprocess.run(
        [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False
    ).stdout.split()
    return tuple(name for name in requested() if name.replace("sm_", "compute_") in known)


def version(nvcc: str) -> str:
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"release ([\d.]+)", output)
    return match[1] if match else "unknown"


def libraries(nvcc: str) -> Path:
    """The folder of libcudart_static.a, as nvcc itself would link it.

    Raises:
        LookupError: there is none.
    """
    command = [nvcc, "--dryrun", "-x", "cu", "/dev/null", "-o", "x"]
    dryrun = subprocess.run(command, capture_output=True, text=True, check=False)
    folders = [Path(folder) for folder in re.findall(r'"-L([^"]+)"', dryrun.stderr)]
    for folder in folders:
        if (folder / "libcudart_static.a").exists():
            return folder.resolve()
    raise LookupError("has no libcudart_static.a beside it")


def flags(nvcc: str, kernel: str) -> str:
    """Of the compile of the CUDA source of that name."""
    known = architectures(nvcc)
    ptx = {name: name for name in known}
    if kernel not in OVER_LOGITS and "sm_90" in known:
        ptx |= {name: "sm_90" for name in known if name != "sm_80"}
    elif "sm_100" in known and "sm_120" in known:
        ptx["sm_120"] = "sm_100"
    codes = {source: [name for name in known if ptx[name] == source] for source in ptx.values()}
    if "sm_90" in known:
        codes["sm_90"].append("compute_90")
    chosen = (
        f"-gencode arch={source.replace('sm_', 'compute_')},code=[{','.join(codes[source])}]"
        for source in codes
    )
    return f"{FLAGS} {' '.join(chosen)}"


def short_names(mangled: list[str]) -> list[str]:
    """Kernels as "name<template arguments>"."""
    shown = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout
    bare = re.sub(r"\w+_cu::|\(nitp::cuda::\w+\)|nitp::|cuda::|^void ", "", shown, flags=re.M)
    return [name.partition("(")[0] for name in bare.splitlines()]


def parse(report: str) -> list[Kernel]:
    """The kernels of an assembler's report (-Xptxas -v), by name and architecture."""
    names = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", report)
    blocks = re.split(r"Compiling entry function ", report)[1:]
    kernels = []
    for (_, architecture), short, block in zip(
        names, short_names([n for n, _ in names]), blocks, strict=True
    ):

        def number(pattern: str, block: str = block) -> int:
            match = re.search(pattern, block)
            return int(match[1]) if match else 0

        kernels.append(
            Kernel(
                short,
                architecture,
                number(r"Used (\d+) registers"),
                number(r"(\d+) bytes smem"),
                number(r"(\d+) bytes stack frame"),
                number(r"(\d+) bytes spill stores"),
                number(r"(\d+) bytes spill loads"),
            )
        )
    return sorted(kernels, key=lambda kernel: (kernel.name, kernel.architecture))


def table(kernels: list[Kernel]) -> str:
    width = max(len(kernel.name) for kernel in kernels)
    lines = [
        f"{'kernel':{width}}  arch     registers  shared  stack  spills (stores + loads, bytes)"
    ]
    lines += [
        f"{k.name:{width}}  {k.architecture:7}  {k.registers:9}  {k.shared:6}  {k.stack:5}  "
        f"{k.spill_stores} + {k.spill_loads}"
        for k in kernels
    ]
    return "\n".join(lines)


def facts(file: Path, reports: list[Path]) -> str:
    """The build's facts and the kernels of the reports as one C++ string literal of JSON, for
    csrc/build_info.cpp."""
    kernels = [kernel for report in reports for kernel in parse(report.read_text())]
    described = [
        {
            "name": k.name,
            "architecture": k.architecture,
            "registers": k.registers,
            "shared": k.shared,
            "stack": k.stack,
            "spills": k.spill_stores + k.spill_loads,
        }
        for k in kernels
    ]
    return f'R"facts({json.dumps({**json.loads(file.read_text()), "kernels": described})})facts"\n'


if __name__ == "__main__":
    out, build_facts, *reports = map(Path, sys.argv[1:])
    out.write_text(facts(build_facts, reports))
