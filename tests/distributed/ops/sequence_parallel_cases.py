"""What runs on every rank for tests/distributed/ops/test_sequence_parallel.py: rows and vocabulary
sharded; collectives, counted."""

# Gradients that a backward pass just left, and options in dictionaries, are more than a type
# checker follows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportReturnType=false
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import nitp_ops
from nitp_ops import CrossEntropyTerm
from nitp_ops.core import gemm
from nitp_ops.distributed import VocabularyShards, bytes_per_pass
from nitp_ops.ops.cross_entropy import vocab_shard
from nitp_ops.ops.cross_entropy.sharded import sequence_rows
from tests.distributed.ops.vocab_parallel_problem import cuts, on_all_ranks, own, problem, same
from tests.support.rank_cases import over_ranks

CASES: dict[str, Callable[[], None]] = {}
ROWS = 5  # of each rank


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


def mine(whole: Tensor) -> Tensor:
    return whole[dist.get_rank() * ROWS :][:ROWS]


def compare(several: int = 0, upstream: Tensor | float = 0.37, **options: Any) -> None:
    """Own rows of the loss, stats and hidden gradient, own columns of the rest, against one process
    with all rows."""
    inputs, labels = problem(rows=ROWS * dist.get_world_size(), several=several)
    rows_of = {"token_weight", "target_weight"}
    loss, stats = nitp_ops.linear_cross_entropy(
        inputs[0], inputs[1], labels, bias=inputs[2], return_stats="entropy", **options
    )
    (loss * upstream).sum().backward()
    for cut in cuts(23):
        hidden = mine(inputs[0].detach()).clone().requires_grad_()
        weight, bias = (own(x.detach(), cut).clone().requires_grad_() for x in inputs[1:])
        own_options = {name: mine(x) if name in rows_of else x for name, x in options.items()}
        own_loss, own_stats = over_ranks(
            hidden, weight, mine(labels), bias=bias, sizes=cut, sequence_parallel=True,
            return_stats="entropy", **own_options,
        )  # fmt: skip
        by_row = options.get("reduction") == "none"
        for again in (True, False):  # and a second backward pass
            scaled = own_loss * (mine(upstream) if isinstance(upstream, Tensor) else upstream)
            found = torch.autograd.grad(scaled.sum(), (hidden, weight, bias), retain_graph=again)
            expected = (mine(inputs[0].grad), own(inputs[1].grad, cut), own(inputs[2].grad, cut))
            for name, a, b in zip(("dh", "dW", "db"), found, expected, strict=True):
                same(a, b, f"{name} at {cut}")
        same(own_loss, mine(loss) if by_row else loss, f"loss at {cut}")
        if not by_row:
            on_all_ranks(own_loss.detach(), "loss")
        for name in stats._fields:
            same(getattr(own_stats, name), mine(getattr(stats, name)), f"{name} at {cut}")


@case
def rows_of_all_ranks_count():
    count = ROWS * dist.get_world_size()
    weight = torch.rand(count, dtype=torch.float64)
    for options in (
        {},
        {"reduction": "sum", "chunk_bytes": 500},
        {"normalizer": 7.0, "token_weight": weight},
    ):
        compare(label_smoothing=0.1, z_loss=0.01, **options)
    compare(class_weight=torch.rand(23, dtype=torch.float64), label_smoothing=0.2)
    compare(several=3, target_weight=torch.rand(count, 3, dtype=torch.float64), token_weight=weight)


@case
def each_rank_differentiates_its_own_rows():
    count = ROWS * dist.get_world_size()
    upstream = torch.randn(count, dtype=torch.float64)
    compare(
        upstream=upstream, reduction="none", token_weight=torch.rand(count, dtype=torch.float64)
    )


@case
def a_buffer_takes_the_gradient_of_the_own_rows():
    inputs, labels = problem(rows=ROWS * dist.get_world_size())
    nitp_ops.linear_cross_entropy(*inputs[:2], labels).backward()
    cut = cuts(23)[1]
    hidden, weight = (
        mine(inputs[0].detach()).clone().requires_grad_(),
        own(inputs[1].detach(), cut).requires_grad_(),
    )
    buffer = torch.ones_like(hidden)
    options = {"sizes": cut, "sequence_parallel": True, "hidden_grad_out": buffer}
    over_ranks(hidden, weight, mine(labels), **options).backward()
    assert hidden.grad is None
    same(buffer, 1 + mine(inputs[0].grad), "buffer")


@case
def terms_share_a_pass():
    count = ROWS * dist.get_world_size()
    inputs, labels = problem(rows=count)
    second, several = problem(rows=count, several=2)
    weight = torch.rand(count, 2, dtype=torch.float64)
    factor = torch.tensor(0.3, dtype=torch.float64)
    terms = [
        CrossEntropyTerm(inputs[0], labels, token_weight=factor),
        CrossEntropyTerm(second[0], several, label_smoothing=0.1, target_weight=weight),
    ]
    loss, stats = nitp_ops.grouped_linear_cross_entropy(terms, inputs[1])
    loss.backward()
    for sequence_parallel in (False, True):
        take = mine if sequence_parallel else lambda x: x
        for cut in cuts(23):
            hidden = [take(term.hidden.detach()).clone().requires_grad_() for term in terms]
            shard = own(inputs[1].detach(), cut).clone().requires_grad_()
            own_terms = [
                CrossEntropyTerm(hidden[0], take(labels), token_weight=factor),
                CrossEntropyTerm(
                    hidden[1], take(several), label_smoothing=0.1, target_weight=take(weight)
                ),
            ]
            # chunks of three rows: some hold rows of both terms
            shards = VocabularyShards(sizes=cut, sequence_parallel=sequence_parallel)
            own_loss, own_stats = nitp_ops.grouped_linear_cross_entropy(
                own_terms, shard, group=shards, chunk_bytes=3 * 8 * max(cut)
            )
            own_loss.backward()
            same(own_loss.detach(), loss.detach(), "loss")
            same(shard.grad, own(inputs[1].grad, cut), "dW")
            for a, b in zip(hidden, terms, strict=True):
                same(a.grad, take(b.hidden.grad), "dh")
            for a, b in zip(own_stats, stats, strict=True):
                for name in b._fields:
                    same(getattr(a, name), take(getattr(b, name)), name)


@contextmanager
def counted() -> Iterator[dict[str, list[int]]]:
    """Bytes of what this rank gives to each collective."""
    calls: dict[str, list[int]] = {"gather": [], "reduce": [], "scatter": []}

    def recorded(name: str, place: int, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*tensors: Any, **options: Any) -> Any:
            calls[name].append(tensors[place].nbytes)
            return function(*tensors, **options)

        return call

    gather, scatter = (
        recorded("gather", 1, vocab_shard.all_gather),
        recorded("scatter", 1, vocab_shard.reduce_scatter),
    )
    reduce = recorded("reduce", 0, dist.all_reduce)
    with (
        mock.patch.object(vocab_shard, "all_gather", gather),
        mock.patch.object(sequence_rows, "all_gather", gather),
        mock.patch.object(sequence_rows, "reduce_scatter", scatter),
        mock.patch.object(vocab_shard.dist, "all_reduce", reduce),
    ):
        yield calls


@case
def one_gather_and_one_sum_a_chunk_of_the_bytes_that_are_promised():
    ranks = dist.get_world_size()
    rows = 4 * ranks
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for several, smoothing, entropy in ((0, 0.0, False), (0, 0.1, True), (3, 0.1, False)):
            inputs, labels = problem(rows=rows, dtype=dtype, several=several)
            labels = labels.clamp(min=0)
            work = torch.float64 if dtype == torch.float64 else torch.float32
            gemm_dtype = torch.float32 if dtype in gemm._WITHOUT_GEMM else dtype
            weight = torch.ones(rows, several, dtype=work) if several else None
            options: dict[str, Any] = {
                "label_smoothing": smoothing,
                "return_stats": "entropy" if entropy else True,
            }
            wanted = {
                "targets": several or 1,
                "label_smoothing": smoothing > 0,
                "entropy": entropy,
                "dtype": dtype,
            }
            cut = cuts(23)[0]
            for chunk_rows, chunks in ((1, rows), (4, ranks), (rows, 1)):
                with counted() as calls:
                    shard = own(inputs[1].detach(), cut).clone().requires_grad_()
                    size = chunk_rows * max(cut) * gemm_dtype.itemsize
                    loss, _ = over_ranks(
                        inputs[0],
                        shard,
                        labels,
                        sizes=cut,
                        target_weight=weight,
                        chunk_bytes=size,
                        **options,
                    )
                    loss.backward()
                promised = bytes_per_pass(rows, 6, ranks, **wanted)  # type: ignore[arg-type]
                assert [len(x) for x in calls.values()] == [chunks, chunks, 0]
                assert (
                    sum(calls["gather"]) == promised.statistics
                    and sum(calls["reduce"]) == promised.gradient
                )
            with counted() as calls:
                take = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
                hidden, shard = (
                    inputs[0].detach()[take].requires_grad_(),
                    own(inputs[1].detach(), cut).requires_grad_(),
                )
                loss, _ = over_ranks(
                    hidden, shard, labels[take], sizes=cut,
                    target_weight=None if weight is None else weight[take], sequence_parallel=True,
                    **options,
                )  # fmt: skip
                loss.backward()
            promised = bytes_per_pass(
                rows, 6, ranks, sequence_parallel=True, weights=several, **wanted
            )  # type: ignore
            assert [len(x) for x in calls.values()] == [3, 0, 1]
            assert calls["gather"] == [promised.labels, promised.hidden, promised.statistics]
            assert calls["scatter"] == [promised.gradient]
            assert promised.total == sum(map(sum, calls.values()))


@case
def no_gradient_is_summed_that_nobody_wants():
    inputs, labels = problem()
    cut = cuts(23)[0]
    with counted() as calls:
        shard = own(inputs[1].detach(), cut).clone().requires_grad_()
        over_ranks(inputs[0].detach(), shard, labels, sizes=cut).backward()
    assert [len(x) for x in calls.values()] == [1, 0, 0]


@case
def torch_compile_gives_the_same():
    """In float32, whose conversion to the working precision converts nothing."""
    inputs, labels = problem(dtype=torch.float32)
    cut = cuts(23)[1]
    for rows_are_sharded in (False, True):

        def step(
            hidden: Tensor, shard: Tensor, sequence_parallel: bool = rows_are_sharded
        ) -> Tensor:
            return over_ranks(
                2 * hidden, shard, labels, sizes=cut, sequence_parallel=sequence_parallel
            )

        found = []
        for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
            hidden, shard = (
                inputs[0].detach().requires_grad_(),
                own(inputs[1].detach(), cut).clone().requires_grad_(),
            )
            loss = function(hidden, shard)
            loss.backward()
            found.append((loss.detach(), hidden.grad, shard.grad))
        for a, b in zip(*found, strict=True):
            same(a, b, "compiled", 1e-6)
