"""What runs on every rank for tests/distributed/ops/test_vocab_parallel.py: a sharded pass beside
the pass of one process."""

# Gradients that a backward pass just left, and options in dictionaries, are more than a type
# checker follows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportReturnType=false
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import nitp_ops
from nitp_ops import reference
from tests.distributed.ops.vocab_parallel_problem import compare, cuts, own, problem, run, same
from tests.support.budget import within_budget
from tests.support.rank_cases import over_ranks

NAN = float("nan")
CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "a normalizer": {"normalizer": 5.0},
    "smoothing": {"label_smoothing": 0.1},
    "nothing but smoothing": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 0.03},
    "softcap and scale": {"softcap": 2.0, "logit_scale": 0.7},
    "everything": {"label_smoothing": 0.2, "z_loss": 0.01, "softcap": 3.0, "logit_scale": 1.3},
    "another ignore_index": {"ignore_index": 3},
    "tiny chunks": {"chunk_bytes": 400},
    "one row a chunk": {"chunk_bytes": 1, "label_smoothing": 0.1},
}


def options_case(options: dict[str, Any]) -> None:
    inputs, labels = problem()
    if "ignore_index" in options:
        labels[labels == -100] = 3
    weights = {
        "token_weight": torch.rand(17, dtype=torch.float64),
        "class_weight": torch.rand(23, dtype=torch.float64),
    }
    for added in ({}, {"token_weight": weights["token_weight"]}, weights):
        compare(inputs, labels, return_stats="entropy", **options, **added)
    compare([*inputs[:2], None], labels, return_stats=True, **options)


for _name, _options in OPTIONS.items():
    CASES[_name] = functools.partial(options_case, _options)


@case
def several_weighted_targets():
    inputs, labels = problem(several=4)
    labels[3, 1], labels[4] = labels[3, 0], torch.tensor([-1, -100, 7, 7])
    weight = torch.rand(17, 4, dtype=torch.float64)
    weight[5, 0] = 0
    for options in ({}, OPTIONS["everything"], {"reduction": "none"}):
        compare(inputs, labels, target_weight=weight, return_stats="entropy", **options)


@case
def no_reduction_with_a_random_upstream():
    inputs, labels = problem()
    upstream = torch.randn(17, dtype=torch.float64)
    for options in ({}, OPTIONS["everything"], {"chunk_bytes": 1}):
        compare(inputs, labels, upstream=upstream, reduction="none", return_stats=True, **options)


@case
def all_rows_ignored():
    inputs, labels = problem()
    for reduction in ("mean", "sum", "none"):
        compare(inputs, labels.fill_(-100), reduction=reduction, return_stats="entropy")


@case
def only_the_wanted_gradients():
    for frozen in range(3):
        inputs, labels = problem()
        for x in inputs[: frozen + 1]:
            x.requires_grad_(False)
        compare(inputs, labels)
        inputs, labels = problem()
        inputs[frozen].requires_grad_(False)
        compare(inputs, labels, reduction="none", upstream=torch.randn(17, dtype=torch.float64))


@case
def a_nan_row_spoils_its_own_loss_and_an_ignored_one_nothing():
    inputs, labels = problem()
    with torch.no_grad():
        inputs[0][2], inputs[0][-2], inputs[0][4] = NAN, NAN, NAN
    weight = torch.ones(17, dtype=torch.float64)
    weight[4] = 0
    compare(
        inputs, labels, reduction="none", token_weight=weight, upstream=1.0, return_stats="entropy"
    )
    labels[2] = -100
    compare(inputs, labels, token_weight=weight, return_stats="entropy")
    for cut in cuts(23):
        assert all(x.isfinite().all() for x in run(inputs, labels, cut, token_weight=weight)[0])


@case
def logits_at_the_end_of_the_range():
    """Infinities that a mask puts into a bias, a large common offset, and a saturated softcap full
    of ties."""
    inputs, labels = problem()
    masked = inputs[2].detach().clone()
    masked[[1, 5, 22]] = -torch.inf
    labels[(labels == 1) | (labels == 5) | (labels == 22)] = 2
    compare([*inputs[:2], masked.requires_grad_()], labels, return_stats="entropy")
    compare(
        [*inputs[:2], (inputs[2].detach() + 1e4).requires_grad_()],
        labels,
        return_stats="entropy",
        tolerance=1e-10,
    )
    compare(
        [x.detach().mul(30).requires_grad_() for x in inputs],
        labels,
        softcap=0.5,
        return_stats="entropy",
    )


@case
def a_second_backward_pass_and_gradient_buffers():
    inputs, labels = problem()
    for cut in cuts(23):
        hidden, weight = (
            inputs[0].detach().requires_grad_(),
            own(inputs[1].detach(), cut).clone().requires_grad_(),
        )
        expected, _ = run([*inputs[:2], None], labels, None, 1.0)
        loss = over_ranks(hidden, weight, labels, sizes=cut)
        first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        second = torch.autograd.grad(loss * 2, (hidden, weight))
        for a, b, c in zip(first, second, (expected[1], own(expected[2], cut)), strict=True):
            same(a, c, "first")
            same(b, 2 * c, "second")
        buffers = torch.ones_like(hidden), torch.ones_like(weight)
        out = {"hidden_grad_out": buffers[0], "weight_grad_out": buffers[1]}
        loss = over_ranks(hidden, weight, labels, sizes=cut, **out)
        (0.5 * loss).backward()
        assert hidden.grad is None and weight.grad is None
        same(buffers[0], 1 + 0.5 * expected[1], "hidden buffer")
        same(buffers[1], 1 + 0.5 * own(expected[2], cut), "weight buffer")


@case
def a_tied_embedding_adds_both_gradients():
    for cut in cuts(23):
        inputs, labels = problem()
        whole, shard = (
            inputs[1].detach().requires_grad_(),
            own(inputs[1].detach(), cut).clone().requires_grad_(),
        )
        ids = torch.arange(17)
        nitp_ops.linear_cross_entropy(whole[ids] + inputs[0].detach(), whole, labels).backward()
        first = sum(cut[: dist.get_rank()])
        here = (ids >= first) & (ids < first + len(shard))
        rows = torch.zeros(17, 6, dtype=torch.float64).index_put(
            (here.nonzero()[:, 0],), shard[ids[here] - first]
        )
        embedded = rows.detach().clone()
        dist.all_reduce(embedded)
        hidden = (embedded + inputs[0].detach()).requires_grad_()
        over_ranks(hidden, shard, labels, sizes=cut).backward()
        rows.backward(hidden.grad)  # on each rank its own rows of the embedding
        same(shard.grad, own(whole.grad, cut), f"tied at {cut}")


@case
def narrow_dtypes_within_the_error_budget():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        draw = torch.Generator().manual_seed(3)
        hidden, weight = (
            torch.randn(n, 64, generator=draw).div(4).to(dtype).requires_grad_()
            for n in (160, 1000)
        )
        inputs, labels = [hidden, weight, None], torch.randint(0, 1000, (160,), generator=draw)
        wide = [x if x is None else x.detach().double().requires_grad_() for x in inputs]
        for options in (
            {},
            {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0},
            {"chunk_bytes": 40_000},
        ):
            exact, _ = run(wide, labels, None, 1.0, **options)
            rest = {name: value for name, value in options.items() if name != "chunk_bytes"}
            leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
            loss = reference.linear_cross_entropy(*leaves, labels, **rest)
            eager = [loss.detach(), *torch.autograd.grad(loss, leaves)]
            for cut in cuts(1000):
                ours, _ = run(inputs, labels, cut, 1.0, **options)
                assert [x.dtype for x in ours[1:]] == [dtype, dtype]
                within_budget(ours[:2], eager[:2], exact[:2])
                if cut[dist.get_rank()] >= 100:  # a norm over fewer rows does not average
                    within_budget(ours[2:], [own(eager[2], cut)], [own(exact[2], cut)])


@case
def wider_logits_under_narrow_weights():
    inputs, labels = problem(dtype=torch.bfloat16)
    compare(
        [*inputs[:2], None],
        labels,
        logits_dtype=torch.float32,
        return_stats="entropy",
        tolerance=2e-2,
    )
    with torch.autocast("cpu", torch.bfloat16):
        inputs, labels = problem(dtype=torch.float32)
        compare(inputs, labels, logits_dtype=torch.float32, tolerance=1e-5)


@case
def what_does_not_fit_is_refused_by_name():
    (hidden, weight, _), labels = problem()
    rank, cut = dist.get_rank(), cuts(23)[0]
    shard = own(weight.detach(), cut)
    wrong: dict[str, dict[str, Any]] = {
        "expected at most one of them": {"vocab_size": 23, "sizes": cut},
        f"expected .23, d. on rank {rank}": {"vocab_size": 23 * dist.get_world_size()},
        "one per rank": {"sizes": cut[1:]},
        "not supported with a sharded unembedding": {"sizes": cut, "backend": "reference"},
        "overlap is 1, expected True or False": {"sizes": cut, "overlap": 1},
        "group is a int, expected a ProcessGroup or a VocabularyShards": {"group": 3},
        r"class_weight has shape \(5,\), expected "
        r"\(23,\)": {"sizes": cut, "class_weight": torch.ones(5)},
    }
    for message, options in wrong.items():
        with pytest.raises((TypeError, ValueError), match=message):
            over_ranks(hidden, shard, labels, **options)
    labels[3] = 23
    with pytest.raises(IndexError, match=r"labels\[3\] is 23, expected a value in \[0, 23\)"):
        over_ranks(hidden, shard, labels, sizes=cut)


@case
def without_overlap_the_all_reduce_ends_first_and_no_bit_changes():
    (inputs, labels), found, overlapped = problem(), [], []
    for overlap in (True, False):
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
            found.append(
                run(inputs, labels, cuts(23)[1], chunk_bytes=8 * 23 * 8, overlap=overlap)[0]
            )
        overlapped.append([each.kwargs["async_op"] for each in reduced.call_args_list])
    assert (
        len(overlapped[0]) > 1
        and all(overlapped[0])
        and not any(overlapped[1])
        and all(map(torch.equal, *found))
    )
