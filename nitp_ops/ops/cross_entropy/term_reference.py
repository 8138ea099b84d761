"""`backend="reference"` of the token losses: the formulas of `reference.py` over checked terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...core import checks
from ...core.gemm import gemm_dtype
from ..reference_rows import of_active_rows
from .stats import TokenEntropyStats, TokenStats
from .term import CrossEntropyTerm, Unembedding, labels_inside

#: Options of a term that the formula takes.
_OF_ROWS = {field.name for field in fields(CrossEntropyTerm)}
_OF_ROWS -= {"hidden", "labels", "hidden_grad_out", "max_rows"}


def token_loss(
    term: CrossEntropyTerm, unembedding: Unembedding, logits_dtype: torch.dtype | str,
    reduction: str, normalizer: Any, return_stats: bool | str,
) -> Any:  # fmt: skip
    """As `linear_cross_entropy`."""
    _check_values([term], unembedding, [""])
    term, weight = _widened(term, unembedding, logits_dtype)
    return loss_of_rows(term, weight, reduction, normalizer, return_stats, **_options(unembedding))


def grouped_token_loss(
    terms: Sequence[CrossEntropyTerm], unembedding: Unembedding, logits_dtype: torch.dtype | str
) -> tuple[Tensor, tuple[Any, ...]]:
    """As `grouped_linear_cross_entropy`."""
    _check_values(terms, unembedding, [f"terms[{place}]." for place in range(len(terms))])
    widened = [_widened(term, unembedding, logits_dtype) for term in terms]
    options, ignore_index = _options(unembedding), unembedding.ignore_index

    def formula(
        active: Tensor | None, weight: Tensor, bias: Tensor | None, *hidden: Tensor
    ) -> Tensor:
        given = [replace(term, hidden=x) for term, x in zip(terms, hidden, strict=True)]
        if active is not None:
            given = [replace(term, labels=_labels_of(active, term, ignore_index)) for term in given]
        return reference.grouped_linear_cross_entropy(given, weight, **options | {"bias": bias})

    hidden = [term.hidden for term, _ in widened]
    loss = of_active_rows(formula, widened[0][1], unembedding.bias, *hidden)
    return loss, tuple(_stats(term, weight, False, options) for term, weight in widened)


def loss_of_rows(
    term: CrossEntropyTerm, weight: Tensor | None, reduction: str, normalizer: Any,
    return_stats: bool | str, **options: Any,
) -> Any:  # fmt: skip
    """The loss of one term; no weight: its rows are logits."""
    of_rows = {name: getattr(term, name) for name in _OF_ROWS}
    of_rows |= {"reduction": reduction, "normalizer": normalizer}
    others = {name: value for name, value in options.items() if name != "bias"}

    def formula(
        active: Tensor | None, hidden: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        labels = term.labels
        if active is not None:
            labels = _labels_of(active, term, options["ignore_index"])
        return reference.linear_cross_entropy(
            hidden, weight, labels, bias=bias, **of_rows, **others
        )

    loss = of_active_rows(formula, term.hidden, weight, options["bias"])
    if not return_stats:
        return loss
    return loss, _stats(term, weight, return_stats == "entropy", options)


def _labels_of(active: Tensor, term: CrossEntropyTerm, ignore_index: int) -> Tensor:
    """The labels of the rows that are active, bool [...] or 0-d; those of the others are absent."""
    absent = ~active
    if term.target_weight is not None and active.dim() > 0:
        absent = absent.unsqueeze(-1)
    return term.labels.masked_fill(absent, ignore_index)


def _options(unembedding: Unembedding) -> dict[str, Any]:
    softcap = unembedding.softcap or None
    options = {"bias": unembedding.bias, "ignore_index": unembedding.ignore_index}
    return options | {"softcap": softcap, "logit_scale": unembedding.logit_scale}


def _check_values(
    terms: Sequence[CrossEntropyTerm], unembedding: Unembedding, prefixes: Sequence[str]
) -> None:
    """Of labels, where the host may read them."""
    for term, prefix in zip(terms, prefixes, strict=True):
        if checks.plain(term.labels):
            labels_inside(
                unembedding.op, term, unembedding.ignore_index, unembedding.vocabulary, prefix
            )


def _widened(
    term: CrossEntropyTerm, unembedding: Unembedding, logits_dtype: torch.dtype | str
) -> tuple[CrossEntropyTerm, Tensor]:
    """The term and the weight for the reference, widened to logits_dtype."""
    buffers = {
        "hidden_grad_out": term.hidden_grad_out,
        "weight_grad_out": unembedding.weight_grad_out,
    }
    for name, buffer in buffers.items():
        if buffer is not None:
            raise ValueError(
                f'{unembedding.op}: {name} is not supported with backend="reference" (it leaves '
                "gradients to autograd)"
            )
    # refuses a logits_dtype that does not fit
    gemm_dtype(unembedding.op, unembedding.weight, logits_dtype)
    if logits_dtype == "auto":
        return term, unembedding.weight
    assert isinstance(logits_dtype, torch.dtype)
    return replace(term, hidden=term.hidden.to(logits_dtype)), unembedding.weight.to(logits_dtype)


@torch.no_grad()
def _stats(
    term: CrossEntropyTerm, weight: Tensor | None, entropy: bool, options: dict[str, Any]
) -> Any:
    stats = TokenEntropyStats(*reference.token_stats(term, weight, **options))
    return stats if entropy else TokenStats(*stats[:4])
