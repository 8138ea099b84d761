"""grouped_linear_cross_entropy: several sets of labelled rows, one unembedding, one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ...core import checks
from . import term_reference
from .autograd import token_pass
from .sharded.sequence_rows import gathered_term, own_stats
from .sharded.shards import VocabularyShards, chosen_backend, local_head
from .stats import TokenStats, stats_of
from .term import CrossEntropyTerm, checked_terms, checked_unembedding, tensors_of

_OP = "grouped_linear_cross_entropy"


def grouped_linear_cross_entropy(
    terms: Sequence[CrossEntropyTerm],
    unembedding: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | str = "auto",
    chunk_bytes: int | None = None,
    weight_grad_out: Tensor | None = None,
    group: VocabularyShards | dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[TokenStats, ...]]:
    """Several labelled sets of hidden states against one unembedding matrix, in one pass.

    ``loss = sum over terms, over rows with a label, of token_weight * row_loss``

    with the row loss of `linear_cross_entropy`. The matrix's gradient is summed over all terms in
    float32 and rounded once. A row whose weight is zero adds exactly nothing to loss and gradients
    (even if it holds NaN): a term of weight zero leaves the others bit-identical. Its stats are
    computed all the same.

    Under torch.compile each new value of a number among the options compiles anew, and past
    ``torch._dynamo.config.recompile_limit`` values (8 unless set) runs eagerly, see
    `linear_cross_entropy`.

    Args:
        terms: `CrossEntropyTerm` s; token_weight may be a 0-d tensor, e.g. weight / count.
        unembedding, bias, ignore_index, softcap, logit_scale, logits_dtype, chunk_bytes,
        weight_grad_out, group,
            backend: as in `linear_cross_entropy`. On CPU a chunk holds rows of several terms; the
                default of
            chunk_bytes is then 0.6 of the float32 gradient up to 120 MiB, or 448 rows up to 240, no
            more than the longest term's, at least 32.

    Returns:
        ``(loss, stats)``: a 0-d loss and one `TokenStats` per term.

    Raises:
        As `linear_cross_entropy`; ValueError for no term at all.

    Example:
        >>> import torch, nitp_ops
        >>> hidden, labels = torch.zeros(3, 8), torch.tensor([1, 2, 3])
        >>> term = nitp_ops.CrossEntropyTerm(hidden, labels, token_weight=torch.tensor(0.5))
        >>> loss, stats = nitp_ops.grouped_linear_cross_entropy([term, term], torch.zeros(16, 8))
        >>> round(loss.item(), 4)  # 2 terms * 3 rows * 0.5 * ln 16
        8.3178
    """
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
    terms = checked_terms(terms, given)
    chosen = chosen_backend(given, backend)
    if chosen == "reference":
        return term_reference.grouped_token_loss(terms, given, logits_dtype)
    checks.plain_autograd(
        _OP, given.weight, given.bias, *(x for term in terms for x in tensors_of(term))
    )
    ranks = head.sequence_group
    whole = terms if ranks is None else [gathered_term(term, ranks) for term in terms]
    loss, values = token_pass(whole, given, chosen, logits_dtype, grouped=True)
    stats = stats_of(values, whole)
    if ranks is not None:
        stats = tuple(own_stats(each, term, ranks) for each, term in zip(stats, terms, strict=True))
    return loss, stats
