"""python csrc/tools/cuda_check.py        compiles csrc/cuda for every architecture and prints what each kernel takes

Fails on a spill, on more registers than a full multiprocessor has for a thread, and on a loop over
logits of more instructions than LIMITS. The loops are counted in the code for sm_90, where there is
cuobjdump.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import build_cuda
import sass

#: Of a thread of the kernels over logits, of which a multiprocessor runs 1024; float64, which is
#: for checks, has more.
REGISTERS = 64
#: Instructions of a thread for each number, in the pass that adds up and in the one that writes. A
#: copy at 4.3 TB/s on an H200 leaves room for 31 in both. The last argument of a kernel is its
#: Kind: 0 plain, 1 capped.
LIMITS = {
    "cross_entropy_rows<Cluster, bfloat16, float, 0>": (7, 7),
    "cross_entropy_rows<OneBlock, bfloat16, float, 0>": (7, 7),
    "cross_entropy_rows<Cluster, float, float, 0>": (7.5, 6.5),
    "cross_entropy_rows<Cluster, bfloat16, float, 1>": (13.5, 11),
    "cross_entropy_rows<OneBlock, bfloat16, float, 1>": (13.5, 11),
    "cross_entropy_gradient_rows<bfloat16, float, 0>": (0, 6.5),
    "cross_entropy_gradient_rows<bfloat16, float, 1>": (0, 10.5),
}


class Rate(NamedTuple):
    """Instructions for each number in the two passes of a kernel, 0 for a pass that it does not
    have."""

    name: str
    adds: float
    writes: float

    def limits(self) -> tuple[float, float]:
        return LIMITS[self.name]


def rate(name: str, loops: list[sass.Loop]) -> Rate:
    """By the loops that take most packs at once: the rest of a row is taken one by one."""
    size = 2 if "float16" in name else 4

    def of_each(turns: list[sass.Loop]) -> float:
        most = max((turn.loads for turn in turns), default=0)
        return max((turn.of_each(size) for turn in turns if turn.loads == most), default=0)

    loaded = [turn for turn in loops if turn.loads]
    adds, writes = (
        [turn for turn in loaded if bool(turn.stores) is stores] for stores in (False, True)
    )
    return Rate(name, of_each(adds), of_each(writes))


def compiled(nvcc: str, cuobjdump: str | None, kernel: str, folder: str) -> tuple[str, list[Rate]]:
    """The assembler's report, and the rates of the kernels that have a limit."""
    binary = Path(folder) / f"{kernel}.o"
    command = [nvcc, *build_cuda.flags(nvcc, kernel).split(), "-c", str(build_cuda.KERNELS[kernel])]
    command += ["-o", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    if (
        cuobjdump is None
        or kernel not in build_cuda.OVER_LOGITS
        or "sm_90" not in build_cuda.architectures(nvcc)
    ):
        return done.stderr, []
    loops = sass.loops_of(cuobjdump, binary)
    named = dict(zip(build_cuda.short_names(list(loops)), loops.values(), strict=True))
    return done.stderr, [rate(name, turns) for name, turns in named.items() if name in LIMITS]


def main() -> int:
    nvcc = build_cuda.find_nvcc()
    if nvcc is None:
        print("cuda-check: skipped, no nvcc on the PATH")
        return 0
    cuobjdump = sass.find_cuobjdump(build_cuda.libraries(nvcc).parents[2] / "bin")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        done = list(
            pool.map(lambda kernel: compiled(nvcc, cuobjdump, kernel, folder), build_cuda.KERNELS)
        )
    kernels = [kernel for report, _ in done for kernel in build_cuda.parse(report)]
    rates = [rate for _, rates in done for rate in rates]
    print(build_cuda.table(kernels))
    spilled = [kernel for kernel in kernels if kernel.spill_stores + kernel.spill_loads]
    over_logits = [
        kernel
        for kernel in kernels
        if kernel.name.startswith(build_cuda.OVER_LOGITS) and "double" not in kernel.name
    ]
    large = [kernel for kernel in over_logits if kernel.registers > REGISTERS]
    print(f"{len(kernels)} kernels, {len(spilled)} with spills, nvcc {build_cuda.version(nvcc)}")
    for kernel in large:
        print(
            f"{kernel.name} takes {kernel.registers} registers on {kernel.architecture}, at most "
            f"{REGISTERS} expected"
        )
    if not rates:
        print("instructions not counted: no cuobjdump, or no sm_90")
    elif missing := LIMITS.keys() - {rate.name for rate in rates}:
        print(f"no such kernel: {', '.join(sorted(missing))}")
        return 1
    slow = [
        each for each in rates if each.adds > each.limits()[0] or each.writes > each.limits()[1]
    ]
    for each in rates:
        most = " + ".join(f"{limit:g}" for limit in each.limits())
        print(
            f"{each.name}: {each.adds:.1f} + {each.writes:.1f} instructions a number, at most "
            f"{most}"
        )
    return int(bool(spilled or large or slow))


if __name__ == "__main__":
    sys.exit(main())
