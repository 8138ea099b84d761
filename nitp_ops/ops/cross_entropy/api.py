"""linear_cross_entropy: w [(1 - e) (lse - z_t) + e (lse - mean z) + c lse^2],  z = cap tanh(scale
(W h + b) / cap).

The public function. `term.py` checks, `autograd.py` is autograd, `chunked.py` the loop over chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ... import reference
from ...core import checks
from . import term_reference
from .autograd import token_pass
from .sharded.sequence_rows import gathered_term, own_losses, own_stats
from .sharded.shards import VocabularyShards, chosen_backend, local_head
from .stats import stats_of
from .term import (
    CrossEntropyTerm,
    checked_normalizer,
    checked_term,
    checked_unembedding,
    tensors_of,
)

_OP = "linear_cross_entropy"


def linear_cross_entropy(
    hidden: Tensor,
    unembedding: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    target_weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    normalizer: float | Tensor | None = None,
    logits_dtype: torch.dtype | str = "auto",
    chunk_bytes: int | None = None,
    max_rows: int | None = None,
    hidden_grad_out: Tensor | None = None,
    weight_grad_out: Tensor | None = None,
    return_stats: bool | str = False,
    group: VocabularyShards | dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Any:
    """Cross-entropy of ``hidden @ unembedding.T`` against labels, with one chunk of logits at a
    time.

    ``z = cap * tanh(scale * (W h + b) / cap)`` (scale, then softcap), ``lse = log sum_v exp(z_v)``,
    ``loss = w * [(1 - e) * (lse - z_t) + e * (lse - mean_v z_v) + c * lse^2]``; with K weighted
    targets per row ``loss = w * [S * lse - (1 - e) * sum_k w_k z_k - e * S * mean_v z_v + c *
    lse^2]``, S = sum of present w_k.

    Rows go through in chunks; each chunk's logits are overwritten with their gradient, so that
    scalar reductions cost three GEMMs and "none" four. The weight gradient is summed over chunks in
    float32 and rounded once (two chunks in bfloat16: the second GEMM is added to the rounded first
    before its own rounding).

    Under torch.compile a number among the options is a constant of the graph, so each new value of
    one compiles anew; past ``torch._dynamo.config.recompile_limit`` values, 8 unless set, the
    function runs eagerly (``fullgraph=True``: an error). `normalizer` is no constant, and tensors
    never are.

    Args:
        hidden: ``[..., d]`` float64, float32, bfloat16 or float16.
        unembedding: ``[V, d]``. GEMMs run in the autocast dtype if autocast is on, else in this
            dtype; on a CPU without fast GEMMs of that (float16; bfloat16 on Intel's without
            AVX-512) in float32.
        labels: ``[...]`` int64 in ``[0, V)``, or `ignore_index`: an ignored row is skipped and
            reaches nothing. With target_weight ``[..., K]``: negative ones are absent too,
            duplicates add, a row without any is ignored.
        bias: ``[V]``, added to the logits in float32.
        ignore_index: the one label that means "absent".
        reduction: "mean" divides the sum by the number of rows that count (zero-weight rows too;
            with class_weight by the sum of the labels' class weights) or by `normalizer`; "sum";
            "none" returns ``[...]`` with zeros where ignored. No row that counts: loss 0 and
            gradients 0.
        target_weight: ``[..., K]``, the weights w_k of labels ``[..., K]``; it gets no gradient.
        token_weight: ``[...]`` (or broadcastable to it), multiplies the whole row loss; it gets no
            gradient. A row of weight 0 counts, but its gradient is 0 and it reaches no other, even
            where a number in it or in unembedding is not finite; so is a row whose targets all
            weigh 0, but for a z-loss or a smoothing with class_weight.
        class_weight: ``[V]``, u: the loss is ``(1 - e) u_t (lse - z_t) + e mean_v u_v (lse - z_v) +
            c lse^2``, as in PyTorch; the z-loss is not weighted. Not with target_weight; it gets no
            gradient.
        label_smoothing: e in [0, 1].
        z_loss: c >= 0.
        softcap: cap > 0, or None.
        logit_scale: scale > 0.
        normalizer: number or 0-d tensor for "mean", e.g. the count of a whole accumulation window.
        logits_dtype: "auto": the GEMMs' dtype. torch.float32: logits in float32 under narrower
            weights. On CUDA, beside hidden states of the weight's dtype, the first GEMM writes them
            and their gradient is rounded to that dtype for the other two; else all three GEMMs run
            in float32, over a weight that is widened one block at a time.
        chunk_bytes: size of one chunk of logits. None: as large as the float32 weight gradient,
            within 32 to 120 MiB, or 512 rows up to 240 MiB; on a GPU 8192 rows, or all of them
            where that takes no more memory.
        max_rows: a bound on the rows that count, for devices where the host does not know their
            number; on CPU, where absent rows are always skipped, it is only checked.
        hidden_grad_out, weight_grad_out: contiguous float32 buffers (float64 for float64) of
            hidden's and unembedding's shape that every backward pass adds the gradient into,
            upstream included; autograd then gives None for that input. Also a pass that asks for
            other gradients only adds to it.
        return_stats: True: also return `TokenStats`; "entropy": `TokenEntropyStats`, with the
            entropy of each row.
        group: the ranks over which the rows of unembedding and bias lie, each rank with its own
            part: a process group (equally many rows on each) or
            `nitp_ops.distributed.VocabularyShards`, beside which unembedding may be a DTensor with
            Shard(0).
        backend: None (the device decides), "native", "triton", "torch" or "reference".

    Returns:
        The loss in float32 (float64 for float64), 0-d or ``[...]``; with return_stats ``(loss,
        stats)``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        IndexError: a label outside ``[0, V)`` that is not `ignore_index`.
        BackendError: the requested backend does not serve this device.
        NotImplementedError: double backward, forward mode, torch.func transforms.

    Example:
        >>> import torch, nitp_ops
        >>> hidden, unembedding = torch.zeros(2, 3, 8), torch.zeros(16, 8)
        >>> labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
        >>> round(nitp_ops.linear_cross_entropy(hidden, unembedding, labels).item(), 4)  # ln 16
        2.7726

    Source: cross-entropy with the chunking idea of the field; z-loss: PaLM, arXiv 2204.02311;
        softcap: Gemma 2,
    arXiv 2408.00118; weighted targets: TOP, arXiv 2508.19228.
    """
    term = CrossEntropyTerm(
        hidden,
        labels,
        token_weight=token_weight,
        target_weight=target_weight,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        hidden_grad_out=hidden_grad_out,
        max_rows=max_rows,
    )
    head = local_head(_OP, unembedding, bias, group)
    given = checked_unembedding(
        _OP,
        head.weight,
        head.bias,
        ignore_index,
        softcap,
        logit_scale,
        chunk_bytes,
        weight_grad_out,
        head.shard,
    )
    normalizer = checked_normalizer(
        _OP, reduction, normalizer, return_stats, reference.working(given.weight)
    )
    term = checked_term(_OP, term, given, "")
    chosen = chosen_backend(given, backend)
    if chosen == "reference":
        return term_reference.token_loss(
            term, given, logits_dtype, reduction, normalizer, return_stats
        )
    checks.plain_autograd(_OP, given.weight, given.bias, *tensors_of(term))
    ranks = head.sequence_group
    whole = term if ranks is None else gathered_term(term, ranks)
    loss, values = token_pass(
        [whole], given, chosen, logits_dtype, reduction=reduction, normalizer=normalizer,
        entropy=return_stats == "entropy",
    )  # fmt: skip
    if ranks is not None and reduction == "none":
        loss = own_losses(loss, ranks).view(term.leading)
    if not return_stats:
        return loss
    stats = stats_of(values, [whole])[0]
    return loss, stats if ranks is None else own_stats(stats, term, ranks)
