"""How many rows a chunk of implicit_token_loss has."""

from __future__ import annotations

import torch

from ...core.chunking import LEAST_BYTES, MOST_BYTES, PROJECTOR_BYTES_ON_GPU, rows_per_chunk
from ...core.gemm import GemmPolicy
from ..gradients import pending_dtype
from .inputs import Call, Pairs, Projector


def row_bytes(width: int, inner: int, out_width: int, dtype: torch.dtype) -> int:
    """Workspace of one row: gate, up and what is made of them; prediction; the hidden state and its
    gradient."""
    return (3 * inner + out_width + 2 * width) * dtype.itemsize


def latent_rows(
    rows: int, width: int, inner: int, out_width: int, dtype: torch.dtype, chunk_bytes: int | None,
    weights: int, itemsize: int, *, device: str = "cpu",
) -> int:  # fmt: skip
    """Rows per chunk. A projector's row is small beside its GEMMs: its chunks are few and large
    (decision 0007).

    weights, itemsize: numbers of the weight gradients, and the bytes of one as `rows_per_chunk`
        wants them."""
    size = row_bytes(width, inner, out_width, dtype)
    large = MOST_BYTES if device == "cpu" else PROJECTOR_BYTES_ON_GPU
    least = large if inner else LEAST_BYTES
    return rows_per_chunk(rows, size, chunk_bytes, weights, least, device=device, itemsize=itemsize)


def rows_of_call(
    pairs: Pairs, projector: Projector, call: Call, policy: GemmPolicy, count: int
) -> int:
    """Rows per chunk of a call that computes `count` pairs."""
    wanted = []
    if call.want_inner:
        wanted += [projector.gate, projector.up]
    if call.want_down:
        wanted.append(projector.down)
    weights = [weight for weight in wanted if weight is not None]
    dtypes = [policy.dtype, *(pending_dtype(weight, None) for weight in weights)]
    itemsize = max(dtype.itemsize for dtype in dtypes)
    return latent_rows(
        count, pairs.hidden.shape[-1], projector.inner, pairs.target.shape[-1], policy.dtype,
        call.chunk_bytes, sum(w.numel() for w in weights), itemsize,
        device=pairs.hidden.device.type,
    )  # fmt: skip
