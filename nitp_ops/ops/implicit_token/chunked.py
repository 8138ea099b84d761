"""The chunked algorithm behind implicit_token_loss: inner activations exist one chunk of rows at a
time.

for each chunk of valid pairs (t, t + shift):
    g, u = h W_gate^T, h W_up^T         GEMM 1, 2 (one call)
    a = silu(g) u                       row kernel
    p = a W_down^T                      GEMM 3
    p <- scale dloss/dp                 row kernel, in place, target read by index
    dW_down += p^T a                    GEMM 4, float32 sum
    a <- p W_down                       GEMM 5
    g, u <- gradients                   row kernel, in place
    dW_gate, dW_up += [g u]^T h         GEMM 6, 7
    dh = [g u] [W_gate; W_up]           GEMM 8, 9

Where the host must not read values (GPUs), every pair takes part, or the first max_rows with the
valid ones first; an invalid one is a pair of weight zero with a hidden state of zeros then.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core import checks
from ...core.chunking import (
    LEAST_BYTES,
    MOST_BYTES,
    PROJECTOR_BYTES_ON_GPU,
    Rows,
    Selection,
    chunks,
    clear,
    length_of,
    place,
    rows_of,
    rows_per_chunk,
    select_rows,
    with_zeros,
    workspace,
)
from ...core.gemm import GemmPolicy, WeightGradient, matmul
from ...kernels import select
from ..cross_entropy.labelled_rows import summed
from ..gradients import formed_dtype, power_of_two, scale_in_place


class Pairs(NamedTuple):
    """hidden [..., T, d] and target [..., T, D]; keep bool [N]: the pair that starts there counts.

    scale: of every loss (0-d) or of each ([N]). hidden_grad_out says in which dtype the gradient of
        hidden waits. gaps:
    pairs that do not count may lie before one that does; else they are the last `shift`."""

    hidden: Tensor
    target: Tensor
    keep: Tensor
    scale: Tensor
    hidden_grad_out: Tensor | None
    shift: int
    max_rows: int | None
    gaps: bool


class Projector(NamedTuple):
    """gate and up [m, d], down [D, m]; only down [D, d]: linear; all None: identity. Gate [2m, d]
    alone holds both."""

    gate: Tensor | None
    up: Tensor | None
    down: Tensor | None

    @property
    def inner(self) -> int:
        """m, 0 without gate and up."""
        return 0 if self.gate is None else len(self.gate) // (2 if self.up is None else 1)

    def gate_up(self, dtype: torch.dtype) -> Tensor | None:
        """[W_gate; W_up] as one [2m, d] matrix: no copy but a cast where it came as one, or lies so
        in memory."""
        gate, up = self.gate, self.up
        if gate is None or up is None:
            return None if gate is None else gate.to(dtype)
        beside = gate.is_contiguous() and up.is_contiguous() and gate.dtype == dtype
        beside = beside and gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
        if beside and up.storage_offset() == gate.storage_offset() + gate.numel():
            return gate.as_strided((2 * gate.shape[0], gate.shape[1]), (gate.shape[1], 1))
        return torch.cat([gate, up]).to(dtype)


class Call(NamedTuple):
    """How the pairs of one call are computed, and which gradients are wanted; gate and up have one
    in common.

    dtype: of the operands of the GEMMs. per_row: each loss, not their sum."""

    backend: str
    dtype: torch.dtype
    distance: int
    eps: float
    chunk_bytes: int | None
    per_row: bool
    want_hidden: bool
    want_inner: bool
    want_down: bool

    @property
    def differentiates(self) -> bool:
        return self.want_hidden or self.want_inner or self.want_down


class Formed(NamedTuple):
    """loss: 0-d or [N]; stats [4, N]; the wanted gradients of hidden, [gate; up] as one [2m, d] and
    down, in turn."""

    loss: Tensor
    stats: Tensor
    gradients: list[Tensor]


class _Sums(NamedTuple):
    """What the chunks add up to."""

    stats: Tensor
    d_hidden: Tensor | None
    d_gate_up: WeightGradient | None
    d_down: WeightGradient | None


def forward_and_gradients(pairs: Pairs, projector: Projector, call: Call) -> Formed:
    """loss = sum of scale * loss over the pairs that count."""
    hidden, kernels = pairs.hidden, select.row_kernels(call.backend)
    policy = GemmPolicy.of(hidden.device, call.dtype)
    reads, count = checks.host_reads(hidden.device), pairs.keep.numel()
    scale = _bounded(pairs)
    unit = power_of_two(scale) if policy.dtype == torch.float16 else None
    selected, rest = _selected(pairs, reads)
    step = _rows_per_chunk(pairs, projector, call, policy, length_of(selected))
    parts = -(-length_of(selected) // step)
    stats = torch.zeros((4, count), dtype=scale.dtype, device=hidden.device)
    sums = _sums(pairs, projector, call, policy, stats, parts)
    # where no scale is other than zero, nothing is differentiated, and a NaN stays out
    differentiate = call.differentiates and (not reads or _some_active(pairs))
    if sums.d_hidden is not None:  # each chunk writes its own rows
        for part in rest if differentiate else (slice(0, count),):
            clear(sums.d_hidden, part)
    kernel_scale = scale if unit is None else scale / unit
    _add_all(
        pairs, projector, call, policy, sums, kernels, selected, step, kernel_scale, differentiate
    )
    if not reads:
        stats.masked_fill_(~pairs.keep, 0)
    if call.per_row:
        loss = torch.where(scale == 0, 0, stats[0] * scale)
    else:
        loss = summed(kernels, stats, scale).to(scale.dtype)
    gradients = [] if sums.d_hidden is None else [sums.d_hidden.view(hidden.shape)]
    gradients += [each.result() for each in (sums.d_gate_up, sums.d_down) if each is not None]
    if not reads:
        factor = (scale != 0).any().to(scale.dtype)
        for gradient in gradients:
            scale_in_place(kernels, gradient, factor if unit is None else factor * unit)
    return Formed(loss, stats, gradients)


def _selected(pairs: Pairs, reads: bool) -> Selection:
    """The pairs that are computed; the last `shift` rows have no partner, so their targets need no
    bound."""
    count, most = pairs.keep.numel(), pairs.max_rows
    if not pairs.gaps:
        possible = max(0, count - pairs.shift)
        return Selection.range(0, possible if reads or most is None else min(possible, most), count)
    possible = count if reads else max(0, count - pairs.shift)
    found, rest = select_rows(pairs.keep[:possible], most)
    return Selection(found, (*rest, slice(possible, count)) if possible < count else rest)


def _some_active(pairs: Pairs) -> bool:
    """Whether a scale is other than zero; of pairs that do not count none is asked, as none is
    computed."""
    return pairs.scale.item() != 0 if pairs.scale.dim() == 0 else bool(_bounded(pairs).any())


def _rows_per_chunk(
    pairs: Pairs, projector: Projector, call: Call, policy: GemmPolicy, count: int
) -> int:
    (gate, up, down), inner = projector, projector.inner
    wanted = [
        w
        for w, flag in ((gate, call.want_inner), (up, call.want_inner), (down, call.want_down))
        if flag
    ]
    weights = [w for w in wanted if w is not None]
    itemsize = max(
        each.itemsize for each in (policy.dtype, *(formed_dtype(w, None) for w in weights))
    )
    return latent_rows(
        count, pairs.hidden.shape[-1], inner, pairs.target.shape[-1], policy.dtype, call.chunk_bytes,
        sum(w.numel() for w in weights), itemsize, device=pairs.hidden.device.type,
    )  # fmt: skip


def _sums(
    pairs: Pairs, projector: Projector, call: Call, policy: GemmPolicy, stats: Tensor, parts: int
) -> _Sums:
    hidden, (gate, _, down), width = pairs.hidden, projector, pairs.hidden.shape[-1]
    d_hidden = d_gate_up = d_down = None
    if call.want_hidden:
        dtype = formed_dtype(hidden, pairs.hidden_grad_out)
        d_hidden = torch.empty((pairs.keep.numel(), width), dtype=dtype, device=hidden.device)
    if call.want_inner and gate is not None:
        shape = torch.Size((2 * projector.inner, width))
        d_gate_up = WeightGradient(shape, policy, formed_dtype(gate, None), parts)
    if call.want_down and down is not None:
        d_down = WeightGradient(down.shape, policy, formed_dtype(down, None), parts)
    return _Sums(stats, d_hidden, d_gate_up, d_down)


def _bounded(pairs: Pairs) -> Tensor:
    """[N], 0 where invalid; NaN where more pairs are valid than max_rows, which nobody may see."""
    scale = torch.where(pairs.keep, pairs.scale, 0)
    if pairs.max_rows is None or checks.host_reads(scale.device):
        return scale
    return scale.masked_fill(pairs.keep & (pairs.keep.sum() > pairs.max_rows), float("nan"))


def _add_all(
    pairs: Pairs, projector: Projector, call: Call, policy: GemmPolicy, sums: _Sums, kernels: Any,
    selected: Tensor | slice, step: int, scale: Tensor, differentiate: bool,
) -> None:  # fmt: skip
    """Every chunk; the workspace is gone when this returns, so that a cast of a weight gradient can
    take its place."""
    down, dtype, reads = projector.down, policy.dtype, checks.host_reads(scale.device)
    source, latent = Rows(pairs.hidden), Rows(pairs.target)
    by_index = latent.flat and (latent.width < 2 or latent.tensor.stride(-1) == 1)
    # without gaps the rows that do not count are the last ones, which are not selected
    masked = not reads and pairs.gaps
    gate_up = projector.gate_up(dtype)
    w_down = None if down is None else down.to(dtype)
    inner, out_width = projector.inner, latent.width
    most = policy.pad(min(step, length_of(selected)))
    buffer = workspace((most * (3 * inner + out_width),), dtype, scale.device)
    for part in chunks(selected, step):
        h = source.take(part).to(dtype)
        if masked:
            h = h.masked_fill(~pairs.keep[part].unsqueeze(1), 0)
        n = h.shape[0]
        even = n if w_down is None else policy.pad(n)
        h = with_zeros(h, even)
        both = buffer[: even * 2 * inner].view(even, 2 * inner)
        a = buffer[even * 2 * inner : even * 3 * inner].view(even, inner)
        p = buffer[even * 3 * inner : even * (3 * inner + out_width)].view(even, out_width)
        g, u = both[:, :inner], both[:, inner:]
        if gate_up is not None:
            matmul(h, gate_up.t(), both)
            kernels.swiglu_rows(g, u, a)
        feature = h if gate_up is None else a
        if w_down is None:
            p.copy_(h)
        else:
            matmul(feature, w_down.t(), p)
        stats = sums.stats[:, part] if isinstance(part, slice) else sums.stats.new_empty(4, n)
        z, index = _partners(latent, part, pairs.shift, by_index)
        part_scale = rows_of(scale, part)
        kernels.alignment_rows_(
            p[:n], z, index, part_scale, stats, None, None, call.distance, call.eps, differentiate
        )
        if not isinstance(part, slice):
            place(sums.stats, 1, part, stats)
        if not differentiate:
            continue
        if sums.d_down is not None:
            sums.d_down.add(p, feature)
        if (
            gate_up is not None
            and w_down is not None
            and (sums.d_hidden is not None or sums.d_gate_up is not None)
        ):
            matmul(p, w_down, a)
            kernels.swiglu_rows_backward_(g, u, a)
        if sums.d_gate_up is not None:
            sums.d_gate_up.add(both, h)
        if sums.d_hidden is not None:
            d_rows = policy.out_view(sums.d_hidden, part) if n == even else None
            upstream, weight = (p, w_down) if gate_up is None else (both, gate_up)
            if weight is None:
                place(sums.d_hidden, 0, part, upstream)
                continue
            d_h = matmul(
                upstream,
                weight,
                upstream.new_empty(even, weight.shape[1]) if d_rows is None else d_rows,
            )[:n]
            if masked:  # zeros times a weight that is not finite
                d_h.masked_fill_(~pairs.keep[part].unsqueeze(1), 0)
            if d_rows is None:
                place(sums.d_hidden, 0, part, d_h)


def _partners(
    latent: Rows, part: Tensor | slice, shift: int, by_index: bool
) -> tuple[Tensor, Tensor | None]:
    """The target rows of a chunk: (rows, None), or (all rows, which of them) where that saves the
    copy."""
    if isinstance(part, slice):
        return latent.dense(slice(part.start + shift, part.stop + shift)), None
    # of pairs that take part without being valid
    partner = (part + shift).clamp_(max=latent.count - 1)
    return (latent.tensor, partner) if by_index else (latent.dense(partner), None)


def row_bytes(width: int, inner: int, out_width: int, dtype: torch.dtype) -> int:
    """Workspace of one row: gate, up and what is made of them; prediction; the hidden state and its
    gradient."""
    return (3 * inner + out_width + 2 * width) * dtype.itemsize


def latent_rows(
    rows: int, width: int, inner: int, out_width: int, dtype: torch.dtype, chunk_bytes: int | None, weights: int,
    itemsize: int, *, device: str = "cpu",
) -> int:  # fmt: skip
    """Rows per chunk. A projector's row is small beside its GEMMs: its chunks are few and large
    (decision 0007).

    weights, itemsize: numbers of the weight gradients, and the bytes of one as `rows_per_chunk`
        wants them."""
    size = row_bytes(width, inner, out_width, dtype)
    large = MOST_BYTES if device == "cpu" else PROJECTOR_BYTES_ON_GPU
    least = large if inner else LEAST_BYTES
    return rows_per_chunk(rows, size, chunk_bytes, weights, least, device=device, itemsize=itemsize)
