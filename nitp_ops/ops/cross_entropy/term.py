"""What a token loss is given: labelled rows and the unembedding, checked once, and never in another
form after that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import reference
from ...core import checks
from .vocab_shard import VocabShard


@dataclass(frozen=True, slots=True, eq=False)
class CrossEntropyTerm:
    """One labelled set of hidden states for `grouped_linear_cross_entropy`; the arguments mean what
    they mean in `linear_cross_entropy`.

    Example:
        >>> import torch, nitp_ops
        >>> hidden, labels = torch.zeros(3, 8), torch.tensor([1, 2, 3])
        >>> term = nitp_ops.CrossEntropyTerm(hidden, labels, z_loss=1e-4)
        >>> term.z_loss
        0.0001
    """

    hidden: Tensor
    labels: Tensor
    _: KW_ONLY
    token_weight: Tensor | None = None
    target_weight: Tensor | None = None
    class_weight: Tensor | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    hidden_grad_out: Tensor | None = None
    max_rows: int | None = None

    @property
    def several(self) -> bool:
        """Rows have K targets, of which negative ones are absent."""
        return self.target_weight is not None

    @property
    def penalties(self) -> tuple[float, float]:
        """Label smoothing and z-loss, in the order of the row kernels."""
        return self.label_smoothing, self.z_loss

    @property
    def needs_target_weight(self) -> bool:
        """Whether a row adds nothing when all its targets weigh nothing."""
        smooth_by_class = self.class_weight is not None and self.label_smoothing > 0
        return self.z_loss == 0 and not smooth_by_class

    @property
    def leading(self) -> torch.Size:
        """Shape of the rows."""
        return self.hidden.shape[:-1]


class Unembedding(NamedTuple):
    """The unembedding [V, d] and what belongs to it, of the call `op`; softcap 0 means none.

    shard: weight, bias and weight_grad_out are the part of this rank."""

    op: str
    weight: Tensor
    bias: Tensor | None
    ignore_index: int
    softcap: float
    logit_scale: float
    chunk_bytes: int | None
    weight_grad_out: Tensor | None
    shard: VocabShard | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Columns on each rank."""
        return (self.weight.shape[0],) if self.shard is None else self.shard.sizes

    @property
    def vocabulary(self) -> int:
        """V, of all ranks."""
        return sum(self.sizes)


def tensors_of(term: CrossEntropyTerm) -> tuple[Tensor | None, ...]:
    """Those that a torch.func transform may have wrapped."""
    return term.hidden, term.labels, term.token_weight, term.target_weight, term.class_weight


def checked_unembedding(
    op: str, weight: Tensor, bias: Tensor | None, ignore_index: int, softcap: float | None,
    logit_scale: float, chunk_bytes: int | None, weight_grad_out: Tensor | None,
    shard: VocabShard | None = None,
) -> Unembedding:  # fmt: skip
    """The arguments that all terms share; of a sharded vocabulary, this rank's part."""
    checks.is_plain(op, "unembedding", weight)
    checks.is_float(op, "unembedding", weight)
    if weight.dim() != 2 or (weight.shape[0] == 0 and shard is None):
        raise ValueError(
            f"{op}: unembedding has shape {tuple(weight.shape)}, expected [V, d] with V >= 1"
        )
    cap, scale = checked_transform(
        op, "unembedding", weight, weight.shape[0], bias, ignore_index, softcap, logit_scale
    )
    if chunk_bytes is not None:
        checks.integer(op, "chunk_bytes", chunk_bytes, least=1)
    if weight_grad_out is not None:
        checks.is_buffer(op, "weight_grad_out", weight_grad_out, "unembedding", weight)
    return Unembedding(
        op, weight, bias, ignore_index, cap, scale, chunk_bytes, weight_grad_out, shard
    )


def checked_transform(
    op: str, like: str, logits: Tensor, columns: int, bias: Tensor | None, ignore_index: int,
    softcap: float | None, logit_scale: float,
) -> tuple[float, float]:  # fmt: skip
    """(softcap, scale) of the logits, a softcap of 0 for none.

    logits: the argument `like`, of their dtype and on their device."""
    if bias is not None:
        checks.is_plain(op, "bias", bias)
        checks.is_float(op, "bias", bias)
        checks.has_shape(op, "bias", bias, (columns,), "[V]")
        checks.same_device(op, "bias", bias, like, logits)
    checks.integer(op, "ignore_index", ignore_index)
    work = reference.working(logits)
    cap = (
        0.0
        if softcap is None
        else checks.number(op, "softcap", softcap, least=0.0, open_end=True, dtype=work)
    )
    return cap, checks.number(op, "logit_scale", logit_scale, least=0.0, open_end=True, dtype=work)


def checked_term(
    op: str, term: CrossEntropyTerm, unembedding: Unembedding, prefix: str
) -> CrossEntropyTerm:
    """The term, its numbers constants of the graph; values of labels are checked where they are
    read."""
    hidden, weight = term.hidden, unembedding.weight
    name = f"{prefix}hidden"
    checks.is_plain(op, name, hidden)
    checks.is_float(op, name, hidden)
    checks.has_dim(op, name, hidden, 1, "[..., d]")
    if hidden.shape[-1] != weight.shape[1]:
        expected = (*term.leading, weight.shape[1])
        raise ValueError(
            f"{op}: {name} has shape {tuple(hidden.shape)}, expected {expected} (unembedding's "
            "width)"
        )
    checks.same_device(op, name, hidden, "unembedding", weight)
    if (hidden.dtype == torch.float64) != (weight.dtype == torch.float64):
        got, expected = checks.name_of(hidden.dtype), checks.name_of(weight.dtype)
        raise TypeError(
            f"{op}: {name} is {got}, expected {expected} (float64 does not mix with other dtypes)"
        )
    if term.max_rows is not None:
        checks.integer(op, f"{prefix}max_rows", term.max_rows, least=0)
    if term.hidden_grad_out is not None:
        checks.is_buffer(op, f"{prefix}hidden_grad_out", term.hidden_grad_out, name, hidden)
    return checked_targets(op, term, "hidden", unembedding.vocabulary, prefix)


def checked_targets(
    op: str, term: CrossEntropyTerm, rows: str, vocabulary: int, prefix: str = ""
) -> CrossEntropyTerm:
    """Everything of a term but its rows, which are the argument `rows`."""
    _check_labels(op, term, rows, prefix)
    _check_weights(op, term, rows, vocabulary, prefix)
    smoothing = checks.number(op, f"{prefix}label_smoothing", term.label_smoothing, least=0.0)
    if smoothing > 1:
        raise ValueError(
            f"{op}: {prefix}label_smoothing is {smoothing}, expected a number in [0, 1]"
        )
    z_loss = checks.number(
        op, f"{prefix}z_loss", term.z_loss, least=0.0, dtype=reference.working(term.hidden)
    )
    if type(term.label_smoothing) is float and type(term.z_loss) is float:
        return term
    return replace(term, label_smoothing=smoothing, z_loss=z_loss)


def _check_labels(op: str, term: CrossEntropyTerm, rows: str, prefix: str) -> None:
    labels, leading, name = term.labels, term.leading, f"{prefix}labels"
    checks.is_plain(op, name, labels)
    checks.is_tensor(op, name, labels)
    checks.has_dtype(op, name, labels, (torch.int64,))
    if term.target_weight is None:
        if labels.dim() == term.hidden.dim() and labels.shape[:-1] == leading:
            raise ValueError(
                f"{op}: {prefix}target_weight is None, expected {tuple(labels.shape)} beside "
                f"labels with {labels.shape[-1]} targets per row"
            )
        checks.has_shape(op, name, labels, leading, f"{rows} without its last axis")
    elif labels.dim() != term.hidden.dim() or labels.shape[:-1] != leading:
        expected = f"({', '.join([*map(str, leading), 'K'])})"
        raise ValueError(
            f"{op}: {name} has shape {tuple(labels.shape)}, expected {expected} (got target_weight)"
        )
    checks.same_device(op, name, labels, prefix + rows, term.hidden)


def _check_weights(
    op: str, term: CrossEntropyTerm, rows: str, vocabulary: int, prefix: str
) -> None:
    for name in ("token_weight", "target_weight", "class_weight"):
        weight = getattr(term, name)
        if weight is None:
            continue
        checks.is_plain(op, prefix + name, weight)
        checks.is_float(op, prefix + name, weight)
        checks.no_gradient(op, prefix + name, weight)
        checks.same_device(op, prefix + name, weight, prefix + rows, term.hidden)
    if term.target_weight is not None:
        checks.has_shape(
            op, f"{prefix}target_weight", term.target_weight, term.labels.shape, "the labels'"
        )
    if term.token_weight is not None and term.token_weight.dim() > 0:
        try:
            term.token_weight.expand(term.leading)
        except RuntimeError:
            checks.has_shape(
                op, f"{prefix}token_weight", term.token_weight, term.leading, "one per row"
            )
    if term.class_weight is not None:
        checks.has_shape(op, f"{prefix}class_weight", term.class_weight, (vocabulary,), "[V]")
        if term.target_weight is not None:
            raise ValueError(
                f"{op}: {prefix}class_weight is not supported with target_weight, expected one of "
                "them"
            )


def checked_terms(
    terms: Sequence[CrossEntropyTerm], unembedding: Unembedding
) -> list[CrossEntropyTerm]:
    op = unembedding.op
    if not isinstance(terms, Sequence):
        raise TypeError(
            f"{op}: terms is a {type(terms).__name__}, expected a sequence of CrossEntropyTerm"
        )
    if not terms:
        raise ValueError(f"{op}: terms is empty, expected at least one CrossEntropyTerm")
    for place, term in enumerate(terms):
        if not isinstance(term, CrossEntropyTerm):
            raise TypeError(
                f"{op}: terms[{place}] is a {type(term).__name__}, expected a CrossEntropyTerm"
            )
    return [
        checked_term(op, term, unembedding, f"terms[{place}].") for place, term in enumerate(terms)
    ]


def labels_inside(
    op: str, term: CrossEntropyTerm, ignore_index: int, vocabulary: int, prefix: str = ""
) -> None:
    checks.labels_inside(op, f"{prefix}labels", term.labels, ignore_index, vocabulary, term.several)


def checked_normalizer(
    op: str, reduction: Any, normalizer: Any, return_stats: Any, work: torch.dtype
) -> Any:
    """The normalizer; refuses outputs that do not exist, too."""
    checks.one_of(op, "reduction", reduction, checks.REDUCTIONS)
    if normalizer is not None:
        if reduction != "mean":
            raise ValueError(
                f'{op}: normalizer is only supported with reduction="mean", got {reduction!r}'
            )
        normalizer = checks.scalar(op, "normalizer", normalizer, work)
    if not isinstance(return_stats, bool) and return_stats != "entropy":
        raise ValueError(
            f"{op}: return_stats is {return_stats!r}, expected False, True or 'entropy'"
        )
    return normalizer
