"""A spec resolved for a model, in words and numbers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import nn

import nitp_ops
from nitp_ops.engine.base import HeadTerm, Objective
from nitp_ops.engine.registry import available, find, plugin_of
from nitp_ops.engine.streams.model_info import ModelInfo
from nitp_ops.engine.streams.needs import named, reads

_HIDDEN = ("last_hidden", "last_residual", "hidden_states")


def explain(
    terms: Sequence[Objective], info: ModelInfo, modules: nn.ModuleDict, tokens: int
) -> str:
    """One paragraph a term (weight, rows, resolved layers, parameters, FLOPs, bytes), the passes,
    the totals."""
    lines = []
    for term in terms:
        kind = "" if term.label == term.name else f" = {term.name}"
        pass_kind = "head term" if isinstance(term, HeadTerm) else "latent term"
        lines.append(f"{term.label}{kind} ({pass_kind})")
        lines += [f"    {name}: {value}" for name, value in facts(term, info).items()]
    lines += [
        f"passes over {tokens:,} tokens:",
        *(f"    {line}" for line in _passes(terms, info, tokens)),
    ]
    heads = sum(isinstance(term, HeadTerm) for term in terms)
    added = sum(parameter.numel() for parameter in modules.parameters())
    lines.append(
        f"total: {heads} head term{'' if heads == 1 else 's'} of {len(terms)} terms, {added:,} "
        "parameters added"
    )
    return "\n".join(lines)


def facts(term: Objective, info: ModelInfo) -> dict[str, object]:
    """What a term means for a model, in reading order."""
    needs = term.requires(info)
    read = ", ".join(named(needs))
    found = {
        "weight": term.weight,
        "denominator": term.denominator,
        "reads": read,
        **term.explain(info),
    }
    states = sum(need.stream in _HIDDEN for need in needs)
    if states:
        size = info.dtype.itemsize
        of = f"{states} hidden stream{'' if states == 1 else 's'} of d numbers of {size} bytes"
        found["bytes per token"] = f"{states * info.hidden_size * size:,} read ({of})"
    return found


def summary(name: str) -> str:
    """One line about a registered objective, or where a plugin that is not loaded yet comes from."""
    plugin = plugin_of(name)
    if plugin is not None:
        return f"plugin {plugin}"
    return (inspect.getdoc(find(name)) or "").partition("\n")[0].replace("``", "")


def listing() -> list[str]:
    """One line an objective."""
    width = max(len(name) for name in available())
    return [f"{name:{width}}  {summary(name)}" for name in available()]


def _passes(terms: Sequence[Objective], info: ModelInfo, tokens: int) -> list[str]:
    """Head terms of one head share a pass; every latent term has its own."""
    groups: dict[str, list[str]] = {}
    states: dict[str, set[str]] = {}
    for term in terms:
        shared = isinstance(term, HeadTerm) and reads(term.requires(info), "head")
        head = "" if shared else str(term.label)
        groups.setdefault(head, []).append(str(term.label))
        if isinstance(term, HeadTerm):
            # rows of last_hidden under equal options are shared
            own = {f"{term.label} {index}" for index in range(term.own_states())}
            states.setdefault(head, set()).update(own or {f"last_hidden {term.penalties}"})
    lines = []
    for head, labels in groups.items():
        if head not in states:
            lines.append(f"{head}: a pass of its own")
            continue
        plan = nitp_ops.explain(
            "linear_cross_entropy",
            rows=tokens,
            width=info.hidden_size,
            vocabulary=info.vocab_size,
            dtype=info.dtype,
            terms=len(states[head]),
        )
        over = f"a head [V, d] of {head}" if head else "the unembedding"
        lines.append(f"{', '.join(labels)}: one pass over {over}; {plan}")
    return lines
