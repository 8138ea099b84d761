"""What a short run measures, in the order of its worth, with the seconds that each takes on a large GPU."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from . import cuda_run, gpu_stages, overhead, peers, profiled, row_kernels, short_tasks
from .cases import Sizes
from .implementations import names_for
from .short_kinds import Piece, Records, Rows, Stage

#: Modules that a peer needs, by how its name begins.
NEEDS = {
    "liger": ("liger_kernel",),
    "liger-sm90": ("liger_kernel", "cutlass"),
    "cce": ("cut_cross_entropy",),
    "quack": ("quack", "cutlass", "tvm_ffi"),
    "trl": ("trl",),
    "unsloth": ("unsloth_zoo",),
}
#: Peers by how their names begin: those that are said to be fast stand right behind ours.
FAST = ("quack", "liger-sm90", "cce")
PEERS = (*FAST, "cce-exact", "liger", "trl", "unsloth", "torch")
#: The heads of linear_cross_entropy that are measured first, by their sizes.
HEADS = ((4096, 4096, 128256), (16384, 2048, 151936), (8192, 4096, 128256), (16384, 1280, 152064))
OBJECTIVES = ("plain", "ntp", "ntp + nitp")
CHUNK_ROWS = ("2048", "4096", "8192", "16384")
CHUNKED: tuple[Sizes, ...] = ({"N": 16384, "d": 2048, "V": 151936}, {"N": 16384, "d": 4096, "V": 128256})
#: Seconds of the tests, in which compilers run in the processes beside them.
TESTS = 80.0


def pieces() -> Iterator[Piece]:
    """All of them; what is kept already and what does not fit is the runner's."""
    token, latent = (list(cuda_run.cases([op], None)) for op in ("linear_cross_entropy", "implicit_token_loss"))
    token.sort(key=lambda case: place(tuple(case.sizes.values()), HEADS))
    yield Records("ceiling", "copy, GEMM", ("copy", "gemm"), 6, short_tasks.ceilings)
    yield Stage("doctor", 15, (gpu_stages.python("-m", "nitp_ops", "doctor"),))
    yield tests([*latent, *token])
    for case in latent:
        yield Rows(case, 14)
    for name in OBJECTIVES:
        case = "Qwen2-0.5B, context 8192, bfloat16"
        yield Records("training_step", case, (name,), 15, short_tasks.training, needs=("transformers",))
    for case in token:
        yield Rows(replace(case, names=[name for name in case.names if name not in peers.PEERS]), 18)
        yield from by_peers(case, fast=True)
    yield from memory_bound()
    for kernel in profiled.KERNELS:
        yield Records("counters", kernel, ("ours",), 25, partial(profiled.counters, kernel=kernel))
    for sizes in CHUNKED:
        name = "x".join(str(size) for size in sizes.values())
        task = partial(short_tasks.chunks, sizes=sizes, rounds=cuda_run.ROUNDS, seconds=cuda_run.SECONDS)
        yield Records("chunk_rows", name, CHUNK_ROWS, 12, task)
    for case in token:
        yield from by_peers(case, fast=False)
    yield Stage("racecheck", 90, (gpu_stages.sanitized("racecheck", "native"),))


def by_peers(case: cuda_run.Case, fast: bool) -> Iterator[Piece]:
    """One piece a peer: those of FAST, or the others."""
    for name in sorted((name for name in case.names if name in peers.PEERS), key=order):
        if usable(name) and (order(name) < len(FAST)) is fast:
            yield Rows(replace(case, names=[name]), 9, "peers", needs_of(name))


def memory_bound() -> Iterator[Piece]:
    """NTP + NITP over NTP, and what only moves bytes, bfloat16 first."""
    for case in cuda_run.cases([overhead.NAME], None):
        yield Rows(case, 10)
    cases = list(cuda_run.cases([*row_kernels.KERNELS, "alignment", "swiglu"], None))
    for case in sorted(cases, key=lambda case: case.dtype != "bfloat16"):
        yield Rows(case, 3)


def tests(cases: list[cuda_run.Case]) -> Stage:
    """The tests on a GPU, few examples each; beside them, what is compiled later is compiled."""
    files = [
        str(path.relative_to(gpu_stages.ROOT)) for path in sorted((gpu_stages.ROOT / "tests").glob("test_gpu_*.py"))
    ]
    options = ["-n", "16", "--hypothesis-profile", "few", "-m", "gpu and not large"]
    step = gpu_stages.python("-m", "pytest", *options, *files)
    known = [(case.op, case.sizes, case.dtype) for case in cases]
    heads = [each for each in known if each[0] == "linear_cross_entropy"]
    until = time.time() + TESTS
    present = [name for name in sorted(peers.PEERS, key=order) if usable(name) and not absent(name)]
    ours = tuple(name for name in names_for("linear_cross_entropy") if name not in peers.PEERS)
    beside = [("ours", partial(short_tasks.warm, cases=known, until=until), ours)]
    if present:
        beside.append(("peers", partial(short_tasks.warm, cases=heads, until=until), tuple(present)))
    return Stage("test", TESTS, (step,), tuple(beside))


def place(item: object, order: tuple[object, ...]) -> int:
    return order.index(item) if item in order else len(order)


def order(name: str) -> int:
    """Where a peer stands: by the longest beginning of its name."""
    begun = [first for first in PEERS if name.startswith(first)]
    return place(max(begun, key=len, default=None), PEERS)


def needs_of(name: str) -> tuple[str, ...]:
    begun = [key for key in NEEDS if name.startswith(key)]
    return NEEDS[max(begun, key=len)] if begun else ()


def absent(name: str) -> bool:
    return any(importlib.util.find_spec(module) is None for module in needs_of(name))


def usable(name: str) -> bool:
    """Whether this torch has its own op, where that is asked for."""
    return not name.startswith("torch") or hasattr(torch.nn.functional, "linear_cross_entropy")
