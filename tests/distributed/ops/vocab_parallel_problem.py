"""Problems for a head whose vocabulary is sharded, and its comparison with the whole head."""

# Gradients that a backward pass just left, and options in dictionaries, are more than a type
# checker follows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportReturnType=false
from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import nitp_ops
from nitp_ops.distributed import shard_rows
from tests.support.rank_cases import over_ranks

D = 6


def cuts(vocabulary: int) -> list[tuple[int, ...]]:
    """Even or nearly, uneven, and with a rank that has no row: the first, then the last."""
    ranks = dist.get_world_size()
    ramp = [rank + 1 for rank in range(ranks - 1)]
    return [
        shard_rows(vocabulary, ranks),
        (*ramp, vocabulary - sum(ramp)),
        (0, *shard_rows(vocabulary, ranks - 1)),
        (*shard_rows(vocabulary, ranks - 1), 0),
    ]


def own(whole: Tensor, cut: tuple[int, ...]) -> Tensor:
    return whole.split(cut)[dist.get_rank()]


def problem(
    vocabulary: int = 23, rows: int = 17, dtype: torch.dtype = torch.float64, several: int = 0
):
    """[hidden, weight, bias] with gradients, and labels on each border of an even cut."""
    draw = torch.Generator().manual_seed(vocabulary + rows)
    shapes = (rows, D), (vocabulary, D), (vocabulary,)
    inputs = [
        torch.randn(s, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
        for s in shapes
    ]
    labels = torch.randint(0, vocabulary, (rows, several) if several else (rows,), generator=draw)
    borders = torch.tensor(shard_rows(vocabulary, dist.get_world_size())).cumsum(0)
    edges = torch.cat([borders[borders < vocabulary], borders - 1, torch.tensor([0])])
    labels.view(-1)[: len(edges)] = edges
    labels[-2] = -100
    return inputs, labels


def run(inputs, labels, cut, upstream: Any = 0.37, **options: Any) -> tuple[list[Tensor], Any]:
    """[loss, gradients], stats; of one process where there is no cut."""
    hidden, weight, bias = (
        None if x is None else x.detach().clone().requires_grad_(x.requires_grad) for x in inputs
    )
    if cut is not None:
        weight, bias = (
            None if x is None else own(x.detach(), cut).clone().requires_grad_(x.requires_grad)
            for x in (weight, bias)
        )
        loss = over_ranks(hidden, weight, labels, bias=bias, sizes=cut, **options)
    else:
        loss = nitp_ops.linear_cross_entropy(hidden, weight, labels, bias=bias, **options)
    loss, stats = loss if options.get("return_stats") else (loss, None)
    leaves = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    if leaves:
        (loss * upstream).sum().backward()
    return [loss.detach(), *(x.grad for x in leaves)], stats


def same(ours: Tensor, expected: Tensor, what: str, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(
        ours,
        expected,
        rtol=tolerance,
        atol=tolerance,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


def on_all_ranks(tensor: Tensor, what: str) -> None:
    """Equal to the last bit."""
    bits = (
        tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.view(1).view(torch.uint8)
    )
    all_bits = [torch.empty_like(bits) for _ in range(dist.get_world_size())]
    dist.all_gather(all_bits, bits)
    assert all(torch.equal(bits, other) for other in all_bits), f"{what} differs between ranks"


def compare(
    inputs, labels, *, upstream: Any = 0.37, tolerance: float = 1e-12, **options: Any
) -> None:
    """The sharded pass at every cut against the pass of one process: loss, gradients, stats."""
    expected, stats = run(inputs, labels, None, upstream, **options)
    for cut in cuts(len(inputs[1])):
        ours, own_stats = run(inputs, labels, cut, upstream, **options)
        names = [
            "loss",
            *(
                n
                for n, x in zip(("dh", "dW", "db"), inputs, strict=True)
                if x is not None and x.requires_grad
            ),
        ]
        for name, a, b in zip(names, ours, expected, strict=True):
            same(a, own(b, cut) if name in ("dW", "db") else b, f"{name} at {cut}", tolerance)
            if name in ("loss", "dh"):
                on_all_ranks(a, name)
        for name in () if stats is None else stats._fields:
            same(getattr(own_stats, name), getattr(stats, name), f"{name} at {cut}", tolerance)
            on_all_ranks(getattr(own_stats, name), name)
