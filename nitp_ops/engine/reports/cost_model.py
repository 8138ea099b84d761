"""What an objective sends and holds on every rank of a mesh, known before anything runs.

Assumed: head, embedding and each term's own parameters are groups of FSDP2 over data x context
parallel ranks, resharded after their forward pass; head and embedding are sharded by vocabulary over
tensor parallel ranks, own parameters are whole on each of them. The trunk's own traffic is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Literal

import torch

import nitp_ops
from nitp_ops.distributed import bytes_per_pass, shard_rows
from nitp_ops.engine.base import LatentTerm
from nitp_ops.engine.composite import build
from nitp_ops.engine.modules.projector import Projector
from nitp_ops.engine.parsing import SpecLike, parse
from nitp_ops.engine.spec.validation import is_int, of_64_bits
from nitp_ops.engine.streams.model_info import ModelInfo
from nitp_ops.engine.streams.needs import reads

from .dry_run import Uses, dry_run

_CHUNKS_A_RANK = 2  # zigzag


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Ranks along the axes of a device mesh: tensor (tp), data (dp) and context parallel (cp).

    Example:
        >>> Mesh.parse("tp=8,dp=4")
        Mesh(tp=8, dp=4, cp=1)
    """

    tp: int = 1
    dp: int = 1
    cp: int = 1

    def __post_init__(self) -> None:
        for name, ranks in vars(self).items():
            if not is_int(ranks) or ranks < 1:
                raise ValueError(
                    f"mesh: {name} is {ranks!r}, expected an integer{of_64_bits(ranks)} >= 1"
                )

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """
        Raises:
            ValueError: anything but ``axis=ranks`` joined by commas.
        """
        names, found = [field.name for field in fields(cls)], {}
        for part in text.split(","):
            name, _, ranks = (word.strip() for word in part.partition("="))
            if name not in names or name in found or not ranks.isdigit():
                expected = f"expected each of {', '.join(names)} at most once, as in tp=8"
                raise ValueError(f'mesh: an axis is "{part}", {expected}')
            found[name] = int(ranks)
        return cls(**found)

    @property
    def sharding(self) -> int:
        """Ranks that parameters are cut over and counts reduced over."""
        return self.dp * self.cp


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind for one purpose.

    Attributes:
        ranks: that take part. bytes: of the whole tensors, summed over the calls: of what an
            all-gather returns, of what a reduce-scatter or an all-reduce is given.
        every: "window" of microbatches, "microbatch", or "report" of metrics.
    """

    purpose: str
    collective: Literal["all-reduce", "all-gather", "reduce-scatter"]
    ranks: int
    bytes: int
    every: Literal["window", "microbatch", "report"]

    @property
    def sent(self) -> int:
        """Bytes that one rank sends in a ring of p: (p - 1) / p of the whole, twice in an
        all-reduce."""
        once = self.bytes * (self.ranks - 1) // self.ranks
        return 2 * once if self.collective == "all-reduce" else once


@dataclass(frozen=True)
class Cost:
    """traffic: what one rank takes part in. memory: ``{what: bytes}`` that it holds at the
    objective's peak."""

    mesh: Mesh
    traffic: tuple[Traffic, ...]
    memory: Mapping[str, int]

    @property
    def sent(self) -> int:
        """Bytes that one rank sends for a window of one microbatch."""
        return sum(each.sent for each in self.traffic if each.every != "report")

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    def lines(self) -> list[str]:
        """For people: one line a kind of traffic, one a kind of memory, the totals."""
        found = [
            f"{each.purpose}: {each.collective} of {each.bytes:,} bytes over {each.ranks:,} ranks, "
            f"{each.sent:,} sent a {each.every}"
            for each in self.traffic
        ]
        found += [f"{what}: {size:,} bytes" for what, size in self.memory.items()]
        return [
            *found,
            f"total: {self.sent:,} bytes sent a step of one microbatch, {self.peak:,} "
            "bytes at the peak",
        ]


def estimate_cost(
    spec: SpecLike, info: ModelInfo, mesh: Mesh, *, tokens: int, sequences: int = 1
) -> Cost:
    """What a spec costs a rank of a mesh.

    Args:
        tokens: hidden states of a rank's microbatch; sequences: how many sequences they are part
            of.

    Raises:
        SpecError: unfit for the model. ValueError: with tp > 1 a latent term that reads the head;
            with cp > 1 a term that can not run on a part of the sequence.

    Example:
        >>> info = ModelInfo(hidden_size=64, vocab_size=512, num_layers=17)
        >>> cost = estimate_cost("ntp + 0.8*nitp", info, Mesh(dp=4, cp=2), tokens=4096)
        >>> [(each.purpose, each.bytes) for each in cost.traffic if each.collective == "all-reduce"]
        [('counts', 24), ('metrics', 600)]
    """
    alone = [
        str(t.label)
        for t in parse(spec).terms
        if isinstance(t, LatentTerm) and reads(t.requires(info), "head")
    ]
    if mesh.tp > 1 and alone:
        names = ", ".join(alone)
        raise ValueError(
            f"mesh: tp is {mesh.tp}, expected 1 with {names}: it reads the head outside the shared "
            "pass"
        )
    uses = dry_run(spec, info, sharded=mesh.cp > 1)
    groups = dict(_groups(spec, info, mesh, uses))
    return Cost(
        mesh,
        tuple(
            each for each in _traffic(info, mesh, uses, groups, tokens, sequences) if each.ranks > 1
        ),
        _memory(spec, info, mesh, uses, groups, tokens),
    )


def _groups(
    spec: SpecLike, info: ModelInfo, mesh: Mesh, uses: Uses
) -> Iterator[tuple[str, list[torch.Size]]]:
    """The shapes of every group of parameters that is read."""
    with torch.device("meta"):
        terms = dict(build(spec, model=info).terms.items())
    by_vocabulary = torch.Size((shard_rows(info.vocab_size, mesh.tp)[0], info.hidden_size))
    for name in uses.calls:
        shapes = (
            [by_vocabulary]
            if name in ("head", "embed")
            else [p.shape for p in terms[name].parameters()]
        )
        if shapes:
            yield name, shapes


def _traffic(
    info: ModelInfo,
    mesh: Mesh,
    uses: Uses,
    groups: Mapping[str, list[torch.Size]],
    tokens: int,
    sequences: int,
) -> Iterator[Traffic]:
    n, width, size = mesh.sharding, info.hidden_size, info.dtype.itemsize
    # and the number of batches
    yield Traffic("counts", "all-reduce", n, 8 * (uses.parts + 1), "window")
    for name, shapes in groups.items():
        # FSDP2 cuts the first axis into n shards of equal size
        whole = size * sum(n * math.ceil(shape[0] / n) * shape[1:].numel() for shape in shapes)
        # before each call, and again before its backward, unless that of a later call still holds
        # them
        yield Traffic(
            f"parameters of {name}", "all-gather", n, 2 * uses.calls[name] * whole, "microbatch"
        )
        yield Traffic(f"gradients of {name}", "reduce-scatter", n, whole, "microbatch")
    if uses.shifts:
        rows = mesh.cp * _CHUNKS_A_RANK * sequences * sum(uses.shifts)
        yield Traffic(
            "rows past the chunks", "all-gather", mesh.cp, rows * width * size, "microbatch"
        )
    if mesh.tp > 1 and uses.sets:
        # targets of the set that has several; which one does not matter
        first = 1 + uses.head_parts - uses.sets
        handed = [
            bytes_per_pass(
                tokens, width, mesh.tp, targets=first if number == 0 else 1, dtype=info.dtype
            )
            for number in range(uses.sets)
        ]
        statistics, gradient = (
            sum(getattr(each, name) for each in handed) for name in ("statistics", "gradient")
        )
        yield Traffic(
            "softmax across the vocabulary",
            "all-gather",
            mesh.tp,
            mesh.tp * statistics,
            "microbatch",
        )
        yield Traffic("hidden gradients across it", "all-reduce", mesh.tp, gradient, "microbatch")
    yield Traffic("metrics", "all-reduce", n, 8 * (uses.numbers + uses.vectors * width), "report")


def _memory(
    spec: SpecLike,
    info: ModelInfo,
    mesh: Mesh,
    uses: Uses,
    groups: Mapping[str, list[torch.Size]],
    tokens: int,
) -> dict[str, int]:
    size, width = info.dtype.itemsize, info.hidden_size
    numbers = {name: sum(shape.numel() for shape in shapes) for name, shapes in groups.items()}
    own = sum(number for name, number in numbers.items() if name not in ("head", "embed"))
    with torch.device("meta"):
        objective = build(spec, model=info)
    state = tokens * width * size
    tapped = sum(need.stream == "hidden_states" for need in objective.requires)
    passes = {name: numbers[name] * size for name in groups}
    for name in passes:
        module = dict(objective.terms.items()).get(name)
        if isinstance(module, Projector) and module.gate_up is not None:
            inner = module.gate_up.shape[0] // 2
            plan = nitp_ops.explain(
                "implicit_token_loss", rows=tokens, width=width, inner=inner, dtype=info.dtype
            )
        elif name == "head" or groups[name] == [torch.Size((info.vocab_size, width))]:
            rows = groups[name][0][0]
            plan = nitp_ops.explain(
                "linear_cross_entropy", rows=tokens, width=width, vocabulary=rows, dtype=info.dtype
            )
        else:
            continue
        passes[name] += plan.peak_bytes
    return {
        "own parameters, their gradients and two float32 moments, cut": own
        * (2 * size + 8)
        // mesh.sharding,
        "gradients of parameters, whole until they are reduced": sum(numbers.values()) * size,
        "tapped states": tapped * state,
        "targets with the rows of other ranks": len(uses.shifts) * state,
        "the largest pass: its parameters whole, its chunk": max(passes.values(), default=0),
    }
