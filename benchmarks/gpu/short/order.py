"""What a short run measures, in the order of its worth, with the seconds that each takes on a large
GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from benchmarks import peers
from benchmarks.cases import Sizes
from benchmarks.gpu import cuda_run, stages
from benchmarks.measure import cuda, profiled
from benchmarks.suites import geometry, overhead, row_kernels

from . import tasks
from .kinds import Piece, Records, Rows, Stage

#: Peers that are said to be fast stand right behind ours, the others behind the rest.
FAST = ("quack-scaled-exp", "quack-rows", "liger-sm90", "cce")
#: Its import replaces functions of torch: it has a process of its own.
PATCHES = "unsloth"
#: Of ours and torch's, what is no more than a check.
LEFT_OUT = ("ours-reference",)
#: The heads of linear_cross_entropy that are measured first, by their sizes.
HEADS = ((4096, 4096, 128256), (16384, 2048, 151936), (8192, 4096, 128256), (16384, 1280, 152064))
OBJECTIVES = ("plain", "ntp", "ntp + nitp", "plain, liger head")
CHUNK_ROWS = ("2048", "4096", "8192", "16384")
CHUNKED: tuple[Sizes, ...] = (
    {"N": 16384, "d": 2048, "V": 151936},
    {"N": 16384, "d": 4096, "V": 128256},
)
GEOMETRIES: tuple[Sizes, ...] = ({"N": 4096, "D": 128256}, {"N": 4096, "D": 151936})
#: Seconds of the tests, in which compilers run in the processes beside them.
TESTS = 80.0


def pieces(capability: str) -> Iterator[Piece]:
    """All of them on a GPU of this compute capability; what is kept already and what does not fit
    is the runner's."""
    token, latent = (
        list(cuda_run.cases([op], None)) for op in ("linear_cross_entropy", "implicit_token_loss")
    )
    token.sort(key=lambda case: place(tuple(case.sizes.values()), HEADS))
    yield Records("ceiling", "copy, GEMM", ("copy", "gemm"), 6, tasks.ceilings)
    yield Stage("doctor", 15, (stages.python("-m", "nitp_ops", "doctor"),))
    yield tests([*latent, *token], capability)
    for case in latent:
        yield Rows(replace(case, names=own(case)), 14)
    for name in OBJECTIVES:
        case = "Qwen2-0.5B, context 8192, bfloat16"
        modules = ("transformers", *(("liger_kernel",) if "liger" in name else ()))
        absent = [module for module in modules if importlib.util.find_spec(module) is None]
        reason = f"{', '.join(absent)} is not installed" if absent else None
        yield Records("training_step", case, (name,), 15, tasks.training, unavailable=reason)
    for case in token:
        yield Rows(replace(case, names=own(case)), 18)
        yield from by_peers(case, capability, fast=True)
    yield from memory_bound()
    for kernel in profiled.KERNELS:
        yield Records("counters", kernel, ("ours",), 25, partial(profiled.counters, kernel=kernel))
    for sizes in GEOMETRIES:
        task = partial(
            geometry.sweep, sizes=sizes, rounds=cuda_run.ROUNDS, seconds=cuda_run.SECONDS
        )
        yield Records("geometry", "x".join(map(str, sizes.values())), geometry.NAMES, 25, task)
    for sizes in CHUNKED:
        name = "x".join(str(size) for size in sizes.values())
        task = partial(tasks.chunks, sizes=sizes, rounds=cuda_run.ROUNDS, seconds=cuda_run.SECONDS)
        yield Records("chunk_rows", name, CHUNK_ROWS, 12, task)
    for case in token:
        yield from by_peers(case, capability, fast=False)
    yield Stage("racecheck", 90, (stages.sanitized("racecheck", "native"),))


def own(case: cuda_run.Case) -> list[str]:
    """Who runs in the process of ours."""
    return [name for name in case.names if name not in peers.PEERS and name not in LEFT_OUT]


def by_peers(case: cuda_run.Case, capability: str, fast: bool) -> Iterator[Rows]:
    """One piece a peer: those of FAST, or the others."""
    for name in sorted(
        (name for name in case.names if name in peers.PEERS), key=lambda name: place(name, FAST)
    ):
        if (name in FAST) is fast:
            major, minor = map(int, capability.split("."))
            reason = peers.unavailable(name, case.sizes, cuda.DTYPES[case.dtype], (major, minor))
            process = name if name == PATCHES else "peers"
            yield Rows(replace(case, names=[name]), 9, process, reason)


def memory_bound() -> Iterator[Piece]:
    """NTP + NITP over NTP, and what only moves bytes, bfloat16 first."""
    for case in cuda_run.cases([overhead.NAME], None):
        yield Rows(case, 10)
    cases = list(cuda_run.cases([*row_kernels.KERNELS, "alignment", "swiglu"], None))
    for case in sorted(cases, key=lambda case: case.dtype != "bfloat16"):
        yield Rows(case, 3)


def tests(cases: list[cuda_run.Case], capability: str) -> Stage:
    """The tests on a GPU, few examples each; beside them, what is compiled later is compiled."""
    files = [
        str(path.relative_to(stages.ROOT))
        for path in sorted((stages.ROOT / "tests/gpu").glob("test_*.py"))
    ]
    options = ["-n", "16", "--hypothesis-profile", "few", "-m", "gpu and not large"]
    step = stages.python("-m", "pytest", *options, *files)
    known = [(case.op, case.sizes, case.dtype) for case in cases]
    ours = tuple(dict.fromkeys(name for case in cases for name in own(case)))
    beside = [("ours", partial(tasks.warm, cases=known), ours)]
    head = next(case for case in cases if case.op == "linear_cross_entropy")
    found = [piece for fast in (True, False) for piece in by_peers(head, capability, fast)]
    present = tuple(
        name
        for piece in found
        if piece.process == "peers" and not piece.unavailable
        for name in piece.names
    )
    if present:
        heads = [each for each in known if each[0] == head.op]
        beside.append(("peers", partial(tasks.warm, cases=heads), present))
    return Stage("test", TESTS, (step,), tuple(beside))


def place(item: object, order: tuple[object, ...]) -> int:
    return order.index(item) if item in order else len(order)
