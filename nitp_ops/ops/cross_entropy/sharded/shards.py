"""`group=` of the token losses: which part of the vocabulary is on this rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from ....core import checks
from ....kernels import select
from ..term import Unembedding
from ..vocab_shard import VocabShard


def shard_rows(vocab_size: int, world: int) -> tuple[int, ...]:
    """Rows of a ``[vocab_size, d]`` matrix on each of `world` ranks, as DTensor's Shard(0) and
    torch.chunk cut it.

    Example:
        >>> from nitp_ops.distributed import shard_rows
        >>> shard_rows(10, 4), shard_rows(3, 4)
        ((3, 3, 3, 1), (1, 1, 1, 0))
    """
    checks.integer("shard_rows", "vocab_size", vocab_size, least=1)
    checks.integer("shard_rows", "world", world, least=1)
    step = -(-vocab_size // world)
    return tuple(max(0, min(step, vocab_size - rank * step)) for rank in range(world))


@dataclass(frozen=True)
class VocabularyShards:
    """`group=` of a token loss whose unembedding ``[V, d]`` and bias ``[V]`` lie over the ranks of
    a process group.

    ``lse = log sum_r sum_{v on rank r} exp(z_v)``. Every rank calls with the same rows, labels,
    weights and options, asks for the same gradients, and differentiates with the same upstream;
    loss, stats and the gradient of hidden are then equal on all of them, and each gets the gradient
    of its own part of unembedding and bias. No logit leaves its rank but those of the targets.

    Args:
        group: the process group, in whose order of ranks the vocabulary lies. None: that of an
            unembedding that is a DTensor with Shard(0) on one mesh dimension, which brings its
            sizes too; else the default group.
        vocab_size: V, spread as `shard_rows` says. sizes: V_r of every rank instead, where it is
            spread otherwise. Neither: every rank has equally many rows.
        sequence_parallel: hidden, labels and weights are this rank's own rows instead, equally many
            on each rank: they are gathered before and the gradient is reduce-scattered. "mean" is
            that of all ranks' rows; stats and ``reduction="none"`` return the own rows. max_rows is
            only checked then.
        overlap: the all-reduce of a chunk's hidden gradients runs while its weight gradient is
            formed. False: before it, which may be faster where the collective takes multiprocessors
            from the GEMM. The bits are the same; sequence_parallel reduces once, after all chunks,
            and has nothing to overlap.

    Raises (the call that gets it):
        TypeError, ValueError: both sizes and vocab_size; a shard that has not the rows of its size;
            no process group.

    Example:
        >>> import torch, torch.distributed as dist, nitp_ops
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> shards = nitp_ops.distributed.VocabularyShards(vocab_size=16)
        >>> hidden, part, labels = torch.zeros(3, 8), torch.zeros(16, 8), torch.tensor([1, 2, 3])
        >>> loss = nitp_ops.linear_cross_entropy(hidden, part, labels, group=shards)
        >>> dist.destroy_process_group()
        >>> round(loss.item(), 4)  # ln 16
        2.7726

    Source: the vocabulary-parallel cross-entropy of Megatron-LM, arXiv 1909.08053.
    """

    group: dist.ProcessGroup | None = None
    vocab_size: int | None = field(default=None, kw_only=True)
    sizes: Sequence[int] | None = field(default=None, kw_only=True)
    sequence_parallel: bool = field(default=False, kw_only=True)
    overlap: bool = field(default=True, kw_only=True)


class LocalHead(NamedTuple):
    """The part of unembedding and bias that is here; shard None: all of them.

    sequence_group: the ranks that the rows are gathered from, None where all have the same."""

    weight: Tensor
    bias: Tensor | None
    shard: VocabShard | None
    sequence_group: dist.ProcessGroup | None


def local_head(op: str, unembedding: Any, bias: Any, group: Any) -> LocalHead:
    """group: a `VocabularyShards`, a process group (equally many rows on each rank), or None."""
    if group is None:
        return LocalHead(unembedding, bias, None, None)
    of_dtensor = checks.is_dtensor(unembedding)
    checks.is_tensor(op, "unembedding", unembedding)
    given = _shards(op, group)
    ranks, vocab_size, sizes = given.group, given.vocab_size, given.sizes
    if of_dtensor:
        if vocab_size is not None or sizes is not None:
            got = f"vocab_size={vocab_size}" if sizes is None else f"sizes={sizes}"
            raise ValueError(
                f"{op}: group has {got} beside a DTensor, expected neither (it brings them)"
            )
        own = _group_of(op, "unembedding", unembedding)
        if ranks is not None and ranks.group_name != own.group_name:
            raise ValueError(
                f"{op}: group is not the process group of unembedding, expected that or "
                "VocabularyShards()"
            )
        ranks, vocab_size = own, unembedding.shape[0]
        if bias is not None:
            if (
                not checks.is_dtensor(bias)
                or _group_of(op, "bias", bias).group_name != ranks.group_name
            ):
                raise TypeError(
                    f"{op}: bias is not sharded like unembedding, expected a DTensor with Shard(0)"
                )
            bias = bias.to_local()
        unembedding = unembedding.to_local()
    ranks = dist.group.WORLD if ranks is None else ranks
    if ranks is None:
        raise ValueError(
            f"{op}: group is None and there is no default group, expected a process group"
        )
    if unembedding.dim() != 2:
        raise ValueError(
            f"{op}: unembedding has shape {tuple(unembedding.shape)}, expected [V_r, d]"
        )
    cut = _sizes(op, unembedding.shape[0], ranks, vocab_size, sizes)
    rank = dist.get_rank(ranks)
    if unembedding.shape[0] != cut[rank]:
        got = tuple(unembedding.shape)
        raise ValueError(
            f"{op}: unembedding has shape {got}, expected [{cut[rank]}, d] on rank {rank} of sizes "
            f"{cut}"
        )
    # the group itself, as torch.compile of torch 2.11 cannot look it up by its name
    shard = VocabShard(
        ranks.group_name, cut, reduce=not given.sequence_parallel, overlap=given.overlap
    )
    return LocalHead(unembedding, bias, shard, ranks if given.sequence_parallel else None)


def chosen_backend(unembedding: Unembedding, backend: str | None) -> str:
    """`select_backend` for the device of the unembedding; the reference knows no shards."""
    op = unembedding.op
    if backend == "reference" and unembedding.shard is not None:
        raise ValueError(f'{op}: backend="reference" is not supported with a sharded unembedding')
    return select.select_backend(op, unembedding.weight.device, backend)


def _shards(op: str, group: Any) -> VocabularyShards:
    given = group if isinstance(group, VocabularyShards) else VocabularyShards(group)
    if given.group is not None and not isinstance(given.group, dist.ProcessGroup):
        got = type(given.group).__name__
        raise TypeError(f"{op}: group is a {got}, expected a ProcessGroup or a VocabularyShards")
    for name in ("sequence_parallel", "overlap"):
        if not isinstance(getattr(given, name), bool):
            raise TypeError(
                f"{op}: group.{name} is {getattr(given, name)!r}, expected True or False"
            )
    return given


def _sizes(
    op: str,
    here: int,
    ranks: dist.ProcessGroup,
    vocab_size: int | None,
    sizes: Sequence[int] | None,
) -> tuple[int, ...]:
    world = ranks.size()
    if vocab_size is not None and sizes is not None:
        raise ValueError(
            f"{op}: group has vocab_size={vocab_size} and sizes={sizes}, expected at "
            "most one of them"
        )
    if vocab_size is not None:
        checks.integer(op, "group.vocab_size", vocab_size, least=1)
    if sizes is not None and not isinstance(sizes, Sequence):
        raise TypeError(f"{op}: group.sizes is {sizes!r}, expected a sequence of integers")
    cut = (here,) * world if sizes is None else tuple(sizes)
    if vocab_size is not None:
        cut = shard_rows(vocab_size, world)
    for rank, size in enumerate(cut):
        checks.integer(op, f"group.sizes[{rank}]", size, least=0)
    if len(cut) != world or sum(cut) == 0:
        raise ValueError(
            f"{op}: group.sizes is {cut}, expected {world} numbers, one per rank, not all 0"
        )
    return cut


def _group_of(op: str, argument: str, tensor: Any) -> dist.ProcessGroup:
    sharded = [
        place for place, placement in enumerate(tensor.placements) if not placement.is_replicate()
    ]
    if len(sharded) != 1 or not tensor.placements[sharded[0]].is_shard(0):
        got = ", ".join(map(str, tensor.placements))
        raise TypeError(
            f"{op}: {argument} is a DTensor ({got}), expected Shard(0) once and Replicate otherwise"
        )
    return tensor.device_mesh.get_group(sharded[0])
