"""Fused cross-entropies of other projects, each behind the arguments of `cases`: optional, imported when asked for.

Every adapter takes the project's own defaults, except where the name of the row says otherwise; its docstring names the
version whose signature it was read from.
"""

from __future__ import annotations

import functools
import inspect

import torch

from .implementations import Forward

#: Name -> what it is, in the order of the table. All of them have linear_cross_entropy only.
PEERS = {
    "liger": "Liger-Kernel's fused linear cross-entropy, weight gradient summed in float32 where it has the option",
    "cce": "cut-cross-entropy with its default gradient filter",
    "cce-exact": "cut-cross-entropy without a gradient filter (filter_eps=None)",
    "quack": "quack's chunked linear cross-entropy",
}


def forward(name: str) -> Forward:
    """The linear_cross_entropy of one peer.

    Raises:
        ImportError: it, or something that it needs, is not installed.
    """
    return {
        "liger": _liger,
        "cce": _cut_cross_entropy,
        "cce-exact": functools.partial(_cut_cross_entropy, filter_eps=None),
        "quack": _quack,
    }[name]()


def _liger() -> Forward:
    """liger-kernel 0.8.5; versions without accum_dtype sum in the weight's dtype."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss as Loss

    wide = {"accum_dtype": torch.float32} if "accum_dtype" in inspect.signature(Loss).parameters else {}
    loss = Loss(**wide)
    return lambda hidden, unembedding, labels: loss(unembedding, hidden, labels)


def _cut_cross_entropy(**options: object) -> Forward:
    """cut-cross-entropy 25.1.1."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, unembedding, labels: linear_cross_entropy(hidden, unembedding, labels, **options)


def _quack() -> Forward:
    """quack-kernels 0.6.5."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy
