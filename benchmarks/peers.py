"""Fused cross-entropies of PyTorch and of other projects, each behind the arguments of `cases`, imported if asked for.

A peer runs at the best settings that its documentation names; its docstring says which, and the version that its
signature was read from. One that cannot run raises, and the reason stands in the table.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Forward

#: Name -> what it is and with which settings, in the order of the table. All of them have linear_cross_entropy only.
PEERS = {
    "torch": "PyTorch's F.linear_cross_entropy, automatic options",
    "torch-best": "the same with acc_policy='accurate' (the fastest of the three on CPU) and four chunks",
    "liger": "Liger-Kernel's fused linear cross-entropy, accum_dtype=float32 where it has the option",
    "cce": "cut-cross-entropy, its default gradient filter; on CPU its documented impl='torch_compile'",
    "cce-exact": "cut-cross-entropy without a gradient filter (filter_eps=None)",
    "quack": "quack's chunked linear cross-entropy, its defaults",
}


def forward(name: str) -> Forward:
    """The linear_cross_entropy of one peer.

    Raises:
        ImportError: it, or something that it needs, is not installed.
    """
    return {
        "torch": _torch,
        "torch-best": partial(_torch, acc_policy="accurate", chunks=4),
        "liger": _liger,
        "cce": _cut_cross_entropy,
        "cce-exact": partial(_cut_cross_entropy, filter_eps=None),
        "quack": _quack,
    }[name]()


def _on_gpu(who: str, hidden: Tensor) -> None:
    if not hidden.is_cuda:
        raise NotImplementedError(f"{who} needs a GPU")


def _no_softcap(who: str, softcap: float | None) -> None:
    if softcap is not None:
        raise NotImplementedError(f"{who} has no softcap")


def _torch(acc_policy: str = "auto", chunks: int = 0) -> Forward:
    """torch 2.13; chunks=0 leaves their number to it."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy")

    def run(hidden: Tensor, unembedding: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
        _no_softcap("F.linear_cross_entropy", softcap)
        split = {"batch_chunk_size": -(-len(hidden) // chunks), "chunking_method": None} if chunks else {}
        options = torch.nn.LinearCrossEntropyOptions(acc_policy=acc_policy, **split)  # type: ignore[arg-type]
        return F.linear_cross_entropy(hidden, unembedding, labels, options=options)

    return run


def _liger() -> Forward:
    """liger-kernel 0.8.5; versions without accum_dtype sum in the weight's dtype."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss as Loss

    wide: dict[str, Any] = {"accum_dtype": torch.float32} if "accum_dtype" in inspect.signature(Loss).parameters else {}

    def run(hidden: Tensor, unembedding: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
        _on_gpu("Liger-Kernel (Triton)", hidden)
        return Loss(softcap=softcap, **wide)(unembedding, hidden, labels)

    return run


def _cut_cross_entropy(**options: Any) -> Forward:
    """cut-cross-entropy 25.1.1."""
    from cut_cross_entropy import linear_cross_entropy

    def run(hidden: Tensor, unembedding: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
        if options:
            _on_gpu("cut-cross-entropy's gradient filter (Triton)", hidden)
        kernel: dict[str, Any] = {} if hidden.is_cuda else {"impl": "torch_compile"}
        return linear_cross_entropy(hidden, unembedding, labels, softcap=softcap, **kernel, **options)

    return run


def _quack() -> Forward:
    """quack-kernels 0.6.5."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def run(hidden: Tensor, unembedding: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
        _no_softcap("quack", softcap)
        return chunked_linear_cross_entropy(hidden, unembedding, labels)

    return run
