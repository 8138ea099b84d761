"""Vocabulary-parallel heads: the token losses with an unembedding sharded over the ranks of a process group.

    loss = vocab_parallel_linear_cross_entropy(hidden, shard, labels, group=group, vocab_size=V)
    loss = vocab_parallel_linear_cross_entropy(hidden, lm_head.weight, labels)        # a DTensor with Shard(0)

Each chunk of rows costs one all-gather of a few numbers a row (one for each job that has rows in it) and one sum of its
hidden gradients; the gradients of unembedding and bias stay on their ranks. Loss, stats and hidden gradients are equal
on all ranks to the last bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import _check
from ._head_job import HeadJob, TokenStats, check_job, head_of
from ._linear_cross_entropy import linear_cross_entropy, token_loss
from ._sequence_rows import OwnRows, gathered_job, own_rows
from ._shared_linear_cross_entropy import check_jobs, shared_token_loss
from ._token_pass import Unembedding
from ._vocab_shard import VocabShard

__all__ = [
    "PassBytes",
    "bytes_per_pass",
    "shard_rows",
    "vocab_parallel_linear_cross_entropy",
    "vocab_parallel_shared_linear_cross_entropy",
]

_HEAD = ("ignore_index", "softcap", "logit_scale", "logits_dtype", "chunk_bytes")


class PassBytes(NamedTuple):
    """Bytes that one rank hands to the collectives of a pass, forward and backward.

    statistics: to the all-gathers of row statistics. gradient: to the sums of hidden gradients. hidden, labels: to the
    gathers of sequence parallelism, else 0. With R ranks a ring sends R - 1 times what it gathers, 2 (R - 1) / R of
    what it all-reduces and (R - 1) / R of what it reduce-scatters."""

    statistics: int
    gradient: int
    hidden: int = 0
    labels: int = 0

    @property
    def total(self) -> int:
        return sum(self)


def bytes_per_pass(
    rows: int,
    width: int,
    world: int,
    *,
    targets: int = 1,
    label_smoothing: bool = False,
    entropy: bool = False,
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = False,
    weights: int = 0,
) -> PassBytes:
    """What one rank hands to the collectives of a pass with all gradients; of several jobs the results add up.

    ``rows (3 + K [+ 1] [+ 1])`` numbers of statistics: maximum, its column, sum of exponentials, K target logits, with
    label smoothing the sum of logits, with the entropy its numerator; ``rows d`` numbers of gradient. Both in float32
    (float64 for float64), whatever the dtype of the products. Neither chunks nor the vocabulary change them.

    Args:
        rows: that count (on a GPU: that are computed), of the whole group. width: d. world: ranks of the group.
        targets: K. label_smoothing, entropy: whether the pass has them. dtype: of the hidden states.
        sequence_parallel: each rank holds rows / world of the rows, ignored ones included. weights: numbers a row that
            travel beside its labels then: K with target_weight, one more with a token_weight of rows.

    Example:
        >>> from nitp_ops.distributed import bytes_per_pass
        >>> bytes_per_pass(8192, 4096, 8)
        PassBytes(statistics=131072, gradient=134217728, hidden=0, labels=0)
    """
    for name, value in {"rows": rows, "width": width, "world": world, "targets": targets, "weights": weights}.items():
        _check.integer("bytes_per_pass", name, value, least=0 if name in ("rows", "weights") else 1)
    number = torch.promote_types(dtype, torch.float32).itemsize
    statistics = rows * (3 + targets + label_smoothing + entropy) * number
    gradient = rows * width * number
    if not sequence_parallel:
        return PassBytes(statistics, gradient)
    own = rows // world
    return PassBytes(statistics, gradient, own * width * dtype.itemsize, own * (targets + weights) * 8)


def shard_rows(vocab_size: int, world: int) -> tuple[int, ...]:
    """Rows of a ``[vocab_size, d]`` matrix on each of `world` ranks, as DTensor's Shard(0) and torch.chunk cut it.

    Example:
        >>> from nitp_ops.distributed import shard_rows
        >>> shard_rows(10, 4), shard_rows(3, 4)
        ((3, 3, 3, 1), (1, 1, 1, 0))
    """
    _check.integer("shard_rows", "vocab_size", vocab_size, least=1)
    _check.integer("shard_rows", "world", world, least=1)
    step = -(-vocab_size // world)
    return tuple(max(0, min(step, vocab_size - rank * step)) for rank in range(world))


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    unembedding: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    sizes: Sequence[int] | None = None,
    sequence_parallel: bool = False,
    overlap: bool = True,
    bias: Tensor | None = None,
    weight_grad_out: Tensor | None = None,
    **options: Any,
) -> Any:
    """`nitp_ops.linear_cross_entropy` with the rows of unembedding and bias spread over the ranks of a group.

    ``lse = log sum_r sum_{v on rank r} exp(z_v)``. Every rank calls it with the same rows, labels, weights and options,
    asks for the same gradients, and differentiates it with the same upstream; loss, stats and the gradient of hidden
    are then equal on all of them, and each gets the gradient of its own part of unembedding and bias. No logit leaves
    its rank but those of the targets.

    Args:
        hidden: ``[..., d]``, on all ranks the same. labels: ``[...]`` (or ``[..., K]``) in ``[0, V)``, likewise.
        unembedding: ``[V_r, d]``, the rows of this rank (there may be none), or a DTensor with Shard(0) on one mesh
            dimension: it brings its group and sizes.
        group: the process group, in whose order of ranks the vocabulary lies. None: the default group.
        vocab_size: V, spread as `shard_rows` says. sizes: V_r of every rank instead, where it is spread otherwise.
        sequence_parallel: hidden, labels and weights are this rank's own rows instead, equally many on each rank: they
            are gathered before and the gradient is reduce-scattered. "mean" is that of all ranks' rows; stats and
            ``reduction="none"`` return the own rows. max_rows is only checked then.
        overlap: the all-reduce of a chunk's hidden gradients runs while its weight gradient is formed. False:
            before it, which may be faster where the collective takes multiprocessors from the GEMM. The bits
            are the same; sequence_parallel reduces once, after all chunks, and has nothing to overlap.
        bias: ``[V_r]``, or a DTensor like unembedding. class_weight stays ``[V]``, on all ranks the same.
        weight_grad_out: float32 buffer ``[V_r, d]`` (float64 for float64).
        options: every other keyword of `nitp_ops.linear_cross_entropy`, but backend="reference".

    Returns:
        As `nitp_ops.linear_cross_entropy`.

    Raises:
        TypeError, ValueError, IndexError: as there; a shard that has not the rows of its size; other DTensors.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from nitp_ops.distributed import vocab_parallel_linear_cross_entropy
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> hidden, shard, labels = torch.zeros(3, 8), torch.zeros(16, 8), torch.tensor([1, 2, 3])
        >>> loss = vocab_parallel_linear_cross_entropy(hidden, shard, labels, vocab_size=16)
        >>> dist.destroy_process_group()
        >>> round(loss.item(), 4)  # ln 16
        2.7726

    Source: the vocabulary-parallel cross-entropy of Megatron-LM, arXiv 1909.08053.
    """
    op = "vocab_parallel_linear_cross_entropy"
    known = inspect.signature(linear_cross_entropy).parameters
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"{op}: {unknown[0]} came, expected a keyword of linear_cross_entropy")
    given = {name: options.get(name, parameter.default) for name, parameter in known.items()}
    of_head = {name: given[name] for name in _HEAD}
    head, ranks = _head(
        op, unembedding, bias, weight_grad_out, group, vocab_size, sizes, sequence_parallel, overlap, of_head
    )
    job = HeadJob(hidden, labels, *(given[name] for name in HeadJob._fields[2:]))
    reduction, stats = given["reduction"], given["return_stats"]
    rest = reduction, given["normalizer"], stats, _backend(op, given["backend"])
    if not sequence_parallel:
        return token_loss(job, head, *rest)
    check_job(op, job, head, "")
    found = token_loss(gathered_job(job, ranks), head, *rest)
    loss = found[0] if stats else found
    if reduction == "none":
        loss = OwnRows.apply(loss, ranks).view(hidden.shape[:-1])  # type: ignore[union-attr]
    return (loss, _own_stats(found[1], job, ranks)) if stats else loss


def vocab_parallel_shared_linear_cross_entropy(
    jobs: Sequence[HeadJob],
    unembedding: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    sizes: Sequence[int] | None = None,
    sequence_parallel: bool = False,
    overlap: bool = True,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | str = "auto",
    chunk_bytes: int | None = None,
    weight_grad_out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[TokenStats, ...]]:
    """`nitp_ops.shared_linear_cross_entropy` with the rows of unembedding and bias spread over the ranks of a group.

    Args:
        jobs, ignore_index, softcap, logit_scale, logits_dtype, chunk_bytes, backend: as there.
        unembedding, group, vocab_size, sizes, sequence_parallel, overlap, bias, weight_grad_out: as in
            `vocab_parallel_linear_cross_entropy`.

    Returns:
        As `nitp_ops.shared_linear_cross_entropy`; with sequence_parallel the stats of the own rows.

    Raises:
        As `vocab_parallel_linear_cross_entropy`.
    """
    op = "vocab_parallel_shared_linear_cross_entropy"
    of_head = {"ignore_index": ignore_index, "softcap": softcap, "logit_scale": logit_scale}
    of_head |= {"logits_dtype": logits_dtype, "chunk_bytes": chunk_bytes}
    head, ranks = _head(
        op, unembedding, bias, weight_grad_out, group, vocab_size, sizes, sequence_parallel, overlap, of_head
    )
    backend = _backend(op, backend)
    if not sequence_parallel:
        return shared_token_loss(jobs, head, backend)
    check_jobs(jobs, head)
    loss, stats = shared_token_loss([gathered_job(job, ranks) for job in jobs], head, backend)
    return loss, tuple(_own_stats(own, job, ranks) for own, job in zip(stats, jobs, strict=True))


def _head(
    op: str, unembedding: Any, bias: Any, buffer: Tensor | None, group: dist.ProcessGroup | None,
    vocab_size: int | None, sizes: Sequence[int] | None, sequence_parallel: bool, overlap: bool,
    of_head: dict[str, Any],
) -> tuple[Unembedding, dist.ProcessGroup]:  # fmt: skip
    """With the group itself, as torch.compile of torch 2.11 cannot look it up by its name."""
    _check.is_tensor(op, "unembedding", unembedding)
    if _check.is_dtensor(unembedding):
        if group is not None or vocab_size is not None or sizes is not None:
            raise ValueError(f"{op}: group, vocab_size or sizes came with a DTensor, expected none (it brings them)")
        group, vocab_size = _group_of(op, "unembedding", unembedding), unembedding.shape[0]
        if bias is not None:
            if not _check.is_dtensor(bias) or _group_of(op, "bias", bias).group_name != group.group_name:
                raise TypeError(f"{op}: bias is not sharded like unembedding, expected a DTensor with Shard(0)")
            bias = bias.to_local()
        unembedding = unembedding.to_local()
    if not isinstance(overlap, bool):
        raise TypeError(f"{op}: overlap is {overlap!r}, expected True or False")
    group = dist.group.WORLD if group is None else group
    if group is None:
        raise ValueError(f"{op}: group is None and no default group is there, expected a process group")
    if (vocab_size is None) == (sizes is None):
        raise ValueError(f"{op}: vocab_size is {vocab_size} and sizes is {sizes}, expected exactly one of them")
    cut = tuple(sizes or ()) if vocab_size is None else shard_rows(vocab_size, group.size())
    for rank, size in enumerate(cut):
        _check.integer(op, f"sizes[{rank}]", size, least=0)
    if len(cut) != group.size() or sum(cut) == 0:
        raise ValueError(f"{op}: sizes is {cut}, expected {group.size()} numbers, one a rank, not all 0")
    rank = dist.get_rank(group)
    if unembedding.dim() != 2 or unembedding.shape[0] != cut[rank]:
        came = tuple(unembedding.shape)
        raise ValueError(f"{op}: unembedding has shape {came}, expected [{cut[rank]}, d] on rank {rank} of sizes {cut}")
    shard = VocabShard(group.group_name, cut, reduce=not sequence_parallel, overlap=overlap)
    return head_of(op, unembedding, bias, **of_head, buffer=buffer, shard=shard), group


def _group_of(op: str, argument: str, tensor: Any) -> dist.ProcessGroup:
    sharded = [place for place, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if len(sharded) != 1 or not tensor.placements[sharded[0]].is_shard(0):
        came = ", ".join(map(str, tensor.placements))
        raise TypeError(f"{op}: {argument} is a DTensor ({came}), expected Shard(0) once and Replicate otherwise")
    return tensor.device_mesh.get_group(sharded[0])


def _backend(op: str, backend: str | None) -> str | None:
    if backend == "reference":
        raise ValueError(f"{op}: backend is 'reference', expected None, 'native' or 'triton' (it knows no shards)")
    return backend


def _own_stats(stats: Any, job: HeadJob, group: dist.ProcessGroup) -> Any:
    fields = stats._asdict()
    shapes = {name: job.labels.shape if name == "target_logit" else job.hidden.shape[:-1] for name in fields}
    return type(stats)(**{name: own_rows(field, group).reshape(shapes[name]) for name, field in fields.items()})
