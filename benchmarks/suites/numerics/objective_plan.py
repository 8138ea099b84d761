"""What docs/plan-numerics.md is made of: several head terms through one pass, against a call for
each of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nitp_ops
from benchmarks.implementations import forward
from benchmarks.measure import children, process_memory, timing
from benchmarks.measure.gemm_times import DTYPES, Sizes, in_child, interleaved, ratio
from benchmarks.report import environment
from benchmarks.report.tables import markdown
from nitp_ops.objectives import CompositeObjective, ModelInfo, Streams, build

OFFSETS = (2, 3, 4)
WAYS = {
    "plan": "the objective: one pass for all heads",
    "separate": "`linear_cross_entropy` for each head",
    "torch": "PyTorch's `F.linear_cross_entropy` for each head",
    "eager": "`F.cross_entropy(F.linear(h, W), labels)` for each head",
    "compile": "torch.compile of that formula for each head",
}
FULL: Sizes = {
    "heads": [("block", 1024, 512, 32000), ("residual", 512, 896, 50304)],
    "terms": [(1024, 512, 32000), (512, 896, 50304)],
    "length": 512,
    "rounds": 7,
}
#: One way leaves the rounds after so many: PyTorch's op takes up to six times as long as the
#: others.
SECONDS = 20.0
TOY: Sizes = {"heads": [("residual", 8, 4, 20)], "terms": [(8, 4, 20)], "length": 8, "rounds": 1}


class Setting:
    """A spec beside a head and hidden states that exist already, and one step over them."""

    def __init__(
        self,
        spec: str,
        sizes: tuple[int, int, int],
        length: int,
        dtype: torch.dtype,
        offsets: Sequence[int] = OFFSETS,
    ) -> None:
        n, d, v = sizes
        self.offsets = offsets
        torch.manual_seed(0)
        self.head = nn.Linear(d, v, bias=False, dtype=dtype)
        self.hidden = torch.randn(n // length, length, d).to(dtype).requires_grad_()
        self.ids = torch.randint(0, v, (n // length, length))
        self.objective: CompositeObjective = build(
            spec, model=ModelInfo(hidden_size=d, vocab_size=v, num_layers=1, dtype=dtype)
        )

    def plan(self) -> Tensor:
        streams = Streams(token_ids=self.ids, last_hidden=self.hidden, head=self.head)
        return self.objective(streams).loss

    def apart(self, loss: Callable[..., Tensor]) -> Tensor:
        """The same heads, a call of `loss` for each."""
        states = [self.hidden]
        if self.offsets:
            states += self.objective.terms["mtp_parallel"](self.hidden, None)
        losses = []
        for k, hidden in zip((1, *self.offsets), states, strict=True):
            labels = F.pad(self.ids[:, k:], (0, k), value=-100)
            losses.append(
                loss(
                    hidden=hidden.flatten(0, 1),
                    unembedding=self.head.weight,
                    labels=labels.flatten(),
                )
            )
        return torch.stack([each.float() for each in losses]).sum()

    def clear(self) -> None:
        for leaf in (self.hidden, *self.head.parameters(), *self.objective.parameters()):
            leaf.grad = None

    def step(self, way: str) -> Callable[[], object]:
        ours = way in ("plan", "separate")
        loss = nitp_ops.linear_cross_entropy if ours else forward("linear_cross_entropy", way)

        def once() -> None:
            self.clear()
            (self.plan() if way == "plan" else self.apart(loss)).backward()

        return once


def page(sizes: Sizes, threads: int) -> str:
    ways = "\n".join(f"* {name}: {what}" for name, what in WAYS.items())
    return f"""# Numbers of the plan

Written by `python -m benchmarks.suites.numerics --only plan`; nothing here is typed by hand.
Machine: {environment.machine_line(environment.machine(threads))}.

## Four heads, one pass

Forward and backward of `ntp + mtp_parallel(offsets={list(OFFSETS)})` over hidden states that exist already. The heads
of mtp_parallel (transformer blocks, or residual ones) are included and the same in every way. Time: medians of the
ratios within {sizes["rounds"]} interleaved rounds; a way leaves them after {SECONDS:.0f} s.
malloc "default" gives blocks over 32 MiB back to the system after each use and maps fresh ones, "raised" keeps them.
Memory (default malloc): the peak of a fresh process's second step, gradients included; "heads alone" is what the
forward pass of those heads keeps for their own backward pass, a part of every way's peak. The ratios of memory are
those of what comes beyond it.

{ways}

{heads(sizes, threads)}

## More targets of the same rows

Time against `ntp` alone, malloc raised: `ntp + mtp_shared` with three offsets reads one row of logits against four
tokens; `top` alone has a head of its own and up to 32 weighted targets a row, so it is one more pass.

{terms(sizes, threads)}
"""


def heads(sizes: Sizes, threads: int) -> str:
    rows, others = [], list(WAYS)[1:]
    for kind, *shape in sizes["heads"]:
        for name, dtype in DTYPES.items():
            spec = f"ntp + mtp_parallel(offsets={list(OFFSETS)}, heads={kind})"
            setting = partial(Setting, spec, tuple(shape), sizes["length"], dtype)
            timed = partial(_times, setting, sizes["rounds"])
            times = {malloc: in_child(timed, threads, malloc) for malloc in children.MALLOC}
            ways = times["default"]
            alone = in_child(partial(_heads_alone, setting), threads)
            peaks = {way: in_child(partial(_peak, setting, way), threads) for way in ways}
            beyond = {way: max(1, peak - alone) for way, peak in peaks.items()}
            memory = [
                f"{beyond['plan'] / beyond[way]:.2f}" if way in ways else "-" for way in others
            ]
            for malloc, t in times.items():
                first = [f"{kind} {' x '.join(map(str, shape))}", name, malloc]
                milliseconds = f"{1e3 * statistics.median(t['plan']):.0f}"
                seconds = [
                    f"{ratio(t['plan'], t[way]):.2f}" if way in ways else "-" for way in others
                ]
                mebibytes = [f"{each / 2**20:.0f}" for each in (alone, peaks["plan"])]
                rows.append([*first, milliseconds, *seconds, *mebibytes, *memory])
                print(rows[-1], flush=True)
    header = [
        "heads, N x d x V",
        "dtype",
        "malloc",
        "plan, ms",
        *(f"time / {way}" for way in others),
    ]
    memory_header = ["heads alone, MiB", "plan, MiB", *(f"memory beyond / {way}" for way in others)]
    return markdown([*header, *memory_header], rows)


def _times(setting: Callable[[], Setting], rounds: int) -> dict[str, list[float]]:
    """Seconds in each round of every way that can run here."""
    made = setting()
    runs: dict[str, Callable[[], object]] = {}
    for way in WAYS:
        try:
            made.step(way)()
        except NotImplementedError:
            continue
        runs[way] = made.step(way)
    return timing.interleave(runs, made.clear, rounds=rounds, seconds=SECONDS)


def _peak(setting: Callable[[], Setting], way: str) -> int:
    made = setting()
    return max(process_memory.peak_of(made.step(way), made.clear), 1)  # nothing at toy sizes


def _heads_alone(setting: Callable[[], Setting]) -> int:
    made = setting()
    kept: list[list[Tensor]] = []

    def run() -> None:
        kept.append(made.objective.terms["mtp_parallel"](made.hidden, None))

    return process_memory.peak_of(run, kept.clear)


def terms(sizes: Sizes, threads: int) -> str:
    specs = {"ntp": "ntp", "shared": "ntp + mtp_shared(offsets=[2, 3, 4])", "top": "top"}
    rows = []
    for shape in sizes["terms"]:
        for name, dtype in DTYPES.items():

            def timed(
                shape: tuple[int, int, int] = shape, dtype: torch.dtype = dtype
            ) -> dict[str, list[float]]:
                made = {
                    key: Setting(spec, shape, sizes["length"], dtype) for key, spec in specs.items()
                }
                return interleaved(
                    {key: each.step("plan") for key, each in made.items()}, sizes["rounds"]
                )

            t = in_child(timed, threads, "raised")
            milliseconds = f"{1e3 * statistics.median(t['ntp']):.0f}"
            ratios = [f"{ratio(t[key], t['ntp']):.2f}" for key in ("shared", "top")]
            rows.append([" x ".join(map(str, shape)), name, milliseconds, *ratios])
            print(rows[-1], flush=True)
    return markdown(["N x d x V", "dtype", "ntp, ms", "ntp + mtp_shared / ntp", "top / ntp"], rows)
