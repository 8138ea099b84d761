"""Fused cross-entropies of PyTorch and of other projects, each behind the arguments of `cases`,
imported if asked for.

A peer runs at the best settings that its documentation names; the docstring of its adapter names
the version whose signature it was written against. Peers are called from outside and timed; nothing
of theirs is copied. What a peer cannot do is said by `unavailable`, which imports none of them, and
raised by its adapter.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Forward, Sizes

Capability = tuple[int, int]
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Peer:
    """What it is, how to get its function, and what it asks for.

    modules: top-level names that must be installed. least: compute capability of the GPU that it
        needs (None: it also
    runs on a CPU); exactly: that one and no newer. multiples: what rows and vocabulary must be
    multiples of. softcap: whether it has one."""

    what: str
    make: Callable[[], Forward]
    modules: tuple[str, ...] = ()
    least: Capability | None = None
    exactly: bool = False
    dtypes: tuple[torch.dtype, ...] = ()
    multiples: tuple[int, int] = (1, 1)
    softcap: bool = False


def _torch(acc_policy: str = "auto", chunks: int = 0) -> Forward:
    """torch 2.13; chunks=0 leaves their number to it."""

    def run(hidden: Tensor, unembedding: Tensor, labels: Tensor) -> Tensor:
        split = (
            {"batch_chunk_size": -(-len(hidden) // chunks), "chunking_method": None}
            if chunks
            else {}
        )
        options = torch.nn.LinearCrossEntropyOptions(acc_policy=acc_policy, **split)  # type: ignore[arg-type]
        return F.linear_cross_entropy(hidden, unembedding, labels, options=options)

    return run


def _liger() -> Forward:
    """liger-kernel 0.8.5, whose functional API chooses an implementation by name: this one also
    without CuTe."""
    from liger_kernel.functional import fused_linear_cross_entropy  # type: ignore[reportMissingImports]

    def run(
        hidden: Tensor, unembedding: Tensor, labels: Tensor, softcap: float | None = None
    ) -> Tensor:
        options = {"softcap": softcap, "accum_dtype": torch.float32, "impl": "nvidia-triton"}
        return fused_linear_cross_entropy(hidden, unembedding, labels, **options)[0]

    return run


def _liger_sm90() -> Forward:
    """liger-kernel 0.8.5, its CuTe path for Hopper, which no public function of that version
    reaches."""
    from liger_kernel.ops.cutedsl.ops import fused_linear_cross_entropy_sm90  # type: ignore[reportMissingImports]

    return _in_order(fused_linear_cross_entropy_sm90.liger_fused_linear_cross_entropy_sm90)


def _cut_cross_entropy(**options: Any) -> Forward:
    """cut-cross-entropy 25.1.1."""
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[reportMissingImports]

    def run(
        hidden: Tensor, unembedding: Tensor, labels: Tensor, softcap: float | None = None
    ) -> Tensor:
        kernel: dict[str, Any] = {} if hidden.is_cuda else {"impl": "torch_compile"}
        return linear_cross_entropy(
            hidden, unembedding, labels, softcap=softcap, **kernel, **options
        )

    return run


def _quack(use_scaled_exp: bool) -> Forward:
    """quack-kernels 0.6.5, which chooses between the two by itself (use_scaled_exp=None)."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy  # type: ignore[reportMissingImports]

    return _in_order(partial(chunked_linear_cross_entropy, use_scaled_exp=use_scaled_exp))


def _trl() -> Forward:
    """trl 1.16.0: log-probabilities of the labels as its SFT trainer asks for them, 32768 columns
    at a time."""
    from trl.kernels import ChunkedLogProbFunction  # type: ignore[reportMissingImports]

    def run(
        hidden: Tensor, unembedding: Tensor, labels: Tensor, softcap: float | None = None
    ) -> Tensor:
        found = ChunkedLogProbFunction.apply(
            hidden, unembedding, None, labels, 1.0, 32768, softcap, 1.0, ()
        )
        return -found[0].mean()  # type: ignore[index]

    return run


def _unsloth() -> Forward:
    """unsloth_zoo 2026.10.9. Its import replaces functions of torch and of transformers: run it
    after all others of a process."""
    from unsloth_zoo.fused_losses.cross_entropy_loss import (  # type: ignore[reportMissingImports]
        unsloth_fused_ce_loss,
    )

    def run(
        hidden: Tensor, unembedding: Tensor, labels: Tensor, softcap: float | None = None
    ) -> Tensor:
        options = {"shift_labels": False, "logit_softcapping": softcap or 0}
        return unsloth_fused_ce_loss(None, hidden[None], unembedding, None, labels[None], **options)

    return run


def _in_order(function: Forward) -> Forward:
    def run(hidden: Tensor, unembedding: Tensor, labels: Tensor) -> Tensor:
        return function(hidden, unembedding, labels)

    return run


_ANY_GPU, _HOPPER = (7, 0), (9, 0)
_CUTE = ("quack", "cutlass", "tvm_ffi", "einops")
#: Name -> peer, in the order of the table. All of them have linear_cross_entropy only.
PEERS: dict[str, Peer] = {
    "torch": Peer("PyTorch's F.linear_cross_entropy, automatic options", _torch),
    "torch-best": Peer(
        "the same with acc_policy='accurate' (the fastest of the three on CPU) and four chunks",
        partial(_torch, "accurate", 4),
    ),
    "liger": Peer(
        "Liger-Kernel's fused linear cross-entropy in Triton, accum_dtype=float32",
        _liger, ("liger_kernel",), _ANY_GPU, softcap=True,
    ),
    "liger-sm90": Peer(
        "Liger-Kernel's fused linear cross-entropy in CuTe for Hopper",
        _liger_sm90, ("liger_kernel", "cutlass"), _HOPPER, True, (torch.bfloat16,), (128, 256),
    ),
    "cce": Peer(
        "cut-cross-entropy, its default gradient filter; on CPU its documented "
        "impl='torch_compile'",
        _cut_cross_entropy, ("cut_cross_entropy",), softcap=True,
    ),
    "cce-exact": Peer(
        "cut-cross-entropy without a gradient filter (filter_eps=None)",
        partial(_cut_cross_entropy, filter_eps=None), ("cut_cross_entropy",), _ANY_GPU, softcap=True,
    ),
    "quack-scaled-exp": Peer(
        "quack's chunked linear cross-entropy, use_scaled_exp=True: exp in the GEMM, its default "
        "on Hopper",
        partial(_quack, True), _CUTE, _HOPPER, True, (torch.bfloat16,), (1, 128),
    ),
    "quack-rows": Peer(
        "quack's chunked linear cross-entropy, use_scaled_exp=False: a kernel for the rows",
        partial(_quack, False), _CUTE, _HOPPER, dtypes=HALF,
    ),
    "trl": Peer("TRL's chunked log-probabilities, as its SFT trainer calls "
                "them", _trl, ("trl",), softcap=True),
    "unsloth": Peer(
        "Unsloth's fused "
        "cross-entropy loss", _unsloth, ("unsloth_zoo", "unsloth"), _ANY_GPU, softcap=True
    ),
}  # fmt: skip


def unavailable(
    name: str, sizes: Sizes, dtype: torch.dtype, capability: Capability | None
) -> str | None:
    """Why a peer cannot run a case, in one line, or None. Nothing is imported and no device asked.

    sizes: N and V, softcap where there is one. capability: of the GPU, None on a CPU."""
    peer = PEERS[name]
    return _missing(name) or _asked_for(name, peer, sizes, dtype, capability)


def _missing(name: str) -> str | None:
    if name.startswith("torch") and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy"
    absent = [module for module in PEERS[name].modules if importlib.util.find_spec(module) is None]
    return f"{name} needs {', '.join(absent)}, not installed" if absent else None


def _asked_for(
    name: str, peer: Peer, sizes: Sizes, dtype: torch.dtype, capability: Capability | None
) -> str | None:
    if peer.least is not None:
        wanted = f"compute capability {peer.least[0]}.{peer.least[1]}"
        if capability is None:
            return f"{name} needs a GPU"
        if capability < peer.least or (peer.exactly and capability != peer.least):
            return f"{name} needs {wanted}{'' if peer.exactly else ' or newer'}, got {capability[0]}.{capability[1]}"
    if peer.dtypes and dtype not in peer.dtypes:
        names = " or ".join(str(each).removeprefix("torch.") for each in peer.dtypes)
        return f"{name} takes {names}, got {str(dtype).removeprefix('torch.')}"
    if sizes.get("softcap") and not peer.softcap:
        return f"{name} has no softcap"
    for size, multiple in zip(("N", "V"), peer.multiples, strict=True):
        if sizes[size] % multiple:
            return f"{name} needs {size} to be a multiple of {multiple}, got {sizes[size]}"
    return None


def forward(name: str) -> Forward:
    """The linear_cross_entropy of one peer; it raises NotImplementedError for a case that it cannot
    run.

    Raises:
        ImportError: it, or something that it needs, is not installed.
    """
    peer, reason = PEERS[name], _missing(name)
    if reason:
        raise ImportError(reason)
    function = peer.make()

    def run(
        hidden: Tensor, unembedding: Tensor, labels: Tensor, softcap: float | None = None
    ) -> Tensor:
        capability = torch.cuda.get_device_capability(hidden.device) if hidden.is_cuda else None
        sizes: dict[str, Any] = {"N": len(hidden), "V": len(unembedding), "softcap": softcap}
        cannot = _asked_for(name, peer, sizes, hidden.dtype, capability)
        if cannot:
            raise NotImplementedError(cannot)
        options = {"softcap": softcap} if softcap is not None else {}
        return function(hidden, unembedding, labels, **options)

    return run
