"""The collectives that objectives call, with an error that says what stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether there is a default process group."""
    return dist.is_available() and dist.is_initialized()


def group_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(number of ranks, this rank's index) in a group, None: all ranks; (1, 0) without
    torch.distributed."""
    return (dist.get_world_size(group), dist.get_rank(group)) if is_distributed() else (1, 0)


def all_reduce(values: Tensor, group: dist.ProcessGroup | None, what: str) -> Tensor:
    """The sum over the ranks, in place."""
    with _explained(what, group):
        dist.all_reduce(values, group=group)
    return values


def all_gather(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[ranks, *values.shape]``; contiguous values, no gradient."""
    ranks, _ = group_size(group)
    if ranks == 1:
        return values.unsqueeze(0)
    gathered = values.new_empty(ranks, *values.shape)
    with _explained("rows of other ranks", group):
        dist.all_gather(list(gathered.unbind()), values, group=group)
    return gathered


def agree(what: str, error: Exception | None, content: str = "") -> None:
    """Where a rank has an error raise on every rank; without torch.distributed raise it. All ranks
    must call.

    For work that can fail on some ranks only (files): those that succeeded would wait for the
    others in vain.

    Args:
        what: the function that the user called.
        error: what went wrong on this rank.
        content: must be the same on all ranks.

    Raises:
        RuntimeError: another rank has an error, or other content. Where this rank has the error:
            the error itself.
    """
    ranks, _ = group_size(None)
    found: list[tuple[str, str]] = [("", content)] * ranks
    if is_distributed():
        own = f"{type(error).__name__}: {error}" if error else ""
        with _explained(what, None):
            dist.all_gather_object(found, (own, content))
    if error is not None:
        raise error
    for rank, (problem, other) in enumerate(found):
        if problem:
            raise RuntimeError(f"{what}: rank {rank} failed: {problem}")
        if other != content:
            raise RuntimeError(
                f"{what}: rank {rank} read other content than this rank, expected one file for all"
            )


@contextmanager
def _explained(what: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    try:
        yield
    # what gloo raises when a peer is gone or late; NCCL's watchdog ends the process
    except RuntimeError as error:
        ranks, rank = group_size(group)
        stopped = f"a rank of {ranks} stopped or did not call it (this is rank {rank})"
        raise RuntimeError(
            f"objective: the collective for {what} failed: {stopped}: {error}"
        ) from error
