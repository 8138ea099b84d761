"""Compiles csrc/cuda with nvcc, and reads from the assembler's report what each kernel takes of a multiprocessor.

python csrc/build_cuda.py        compiles every .cu for every architecture, prints the table, fails on a spill
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "cuda"
KERNELS = ("accumulate", "alignment", "cross_entropy", "cross_entropy_gradient", "scale", "swiglu")
# Machine code for A100, H100/H200 and B200. A GPU of any other generation translates the PTX at its first launch: that
# of compute_80, because code for an "a" target runs on that chip only; rows of logits do without clusters there.
ARCHITECTURES = {"sm_80": "[sm_80,compute_80]", "sm_90a": "sm_90a", "sm_100a": "sm_100a"}
FLAGS = "-std=c++17 -O3 -Xptxas -v -Xcompiler -fPIC,-fvisibility=hidden"


class Kernel(NamedTuple):
    """What one kernel takes: registers a thread; static shared memory a block, stack and spills a thread in bytes."""

    name: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


def find_nvcc() -> str | None:
    return shutil.which("nvcc")


def version(nvcc: str) -> str:
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release ([\d.]+)", told)
    return match[1] if match else "unknown"


def libraries(nvcc: str) -> Path:
    """The folder of libcudart_static.a, as nvcc itself would link it."""
    command = [nvcc, "--dryrun", "-x", "cu", "/dev/null", "-o", "x"]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    folders = [Path(folder) for folder in re.findall(r'"-L([^"]+)"', told.stderr)]
    return next(folder.resolve() for folder in folders if (folder / "libcudart_static.a").exists())


def flags(architectures: tuple[str, ...] = tuple(ARCHITECTURES)) -> str:
    codes = (f"-gencode arch={name.replace('sm_', 'compute_')},code={ARCHITECTURES[name]}" for name in architectures)
    return f"{FLAGS} {' '.join(codes)}"


def parse(report: str) -> list[Kernel]:
    """The kernels of an assembler's report (-Xptxas -v), by name and architecture."""
    names = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", report)
    shown = subprocess.run(
        ["c++filt"], input="\n".join(n for n, _ in names), capture_output=True, text=True, check=True
    )
    blocks = re.split(r"Compiling entry function ", report)[1:]
    kernels = []
    for (_, architecture), name, block in zip(names, shown.stdout.splitlines(), blocks, strict=True):
        short = re.sub(r"\(anonymous namespace\)::|nitp::|cuda::|^void ", "", name).partition("(")[0]

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
    lines = [f"{'kernel':{width}}  arch     registers  shared  stack  spills (stores + loads, bytes)"]
    lines += [
        f"{k.name:{width}}  {k.architecture:7}  {k.registers:9}  {k.shared:6}  {k.stack:5}  "
        f"{k.spill_stores} + {k.spill_loads}"
        for k in kernels
    ]
    return "\n".join(lines)


def c_table(reports: list[Path]) -> str:
    """The same as initialisers that csrc/module.cpp includes."""
    kernels = [kernel for report in reports for kernel in parse(report.read_text())]
    return "".join(
        f'{{"{k.name}", "{k.architecture}", {k.registers}, {k.shared}, {k.stack}, {k.spill_stores + k.spill_loads}}},\n'
        for k in kernels
    )


def main() -> int:
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda-check: skipped, no nvcc on the PATH")
        return 0

    def compiled(kernel: str, folder: str) -> str:
        command = [nvcc, *flags().split(), "-c", str(FOLDER / f"{kernel}.cu"), "-o", f"{folder}/{kernel}.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        return done.stderr

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda kernel: compiled(kernel, folder), KERNELS))
    kernels = [kernel for report in reports for kernel in parse(report)]
    print(table(kernels))
    spilled = [kernel for kernel in kernels if kernel.spill_stores + kernel.spill_loads]
    print(f"{len(kernels)} kernels, {len(spilled)} with spills, nvcc {version(nvcc)}")
    return int(bool(spilled))


if __name__ == "__main__":
    if sys.argv[1:2] == ["table"]:
        Path(sys.argv[2]).write_text(c_table([Path(name) for name in sys.argv[3:]]))
    else:
        sys.exit(main())
