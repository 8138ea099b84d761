"""A spec resolved for a model, in words and numbers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .base import HeadTerm, Objective
from .model_info import ModelInfo


def explain(terms: Sequence[Objective], info: ModelInfo, modules: nn.ModuleDict) -> str:
    """One paragraph a term (weight, rows, resolved layers, parameters, FLOPs), then the totals."""
    lines = []
    for term in terms:
        kind = "" if term.label == term.name else f" = {term.name}"
        pass_kind = "head term" if isinstance(term, HeadTerm) else "latent term"
        lines.append(f"{term.label}{kind} ({pass_kind})")
        facts = {"weight": term.weight, "denominator": term.denominator, "reads": _reads(term, info)}
        lines += [f"    {name}: {value}" for name, value in (facts | term.explain(info)).items()]
    heads = sum(isinstance(term, HeadTerm) for term in terms)
    added = sum(parameter.numel() for parameter in modules.parameters())
    lines.append(
        f"total: {heads} head term{'' if heads == 1 else 's'} of {len(terms)} terms, {added:,} parameters added"
    )
    return "\n".join(lines)


def _reads(term: Objective, info: ModelInfo) -> str:
    return ", ".join(sorted(term.requires(info)))
