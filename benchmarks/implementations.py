"""Who computes: our op on each backend, the formula as one writes it in PyTorch, that formula
compiled, PyTorch's own op, other projects (`peers`).

Every function takes the arguments of `cases.Inputs` by name. Cosine losses are formed in float32,
as the formula must be (bfloat16 numbers just below 1 are 0.004 apart); logits stay in the GEMM's
dtype unless the name says float32.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import nitp_ops

from . import peers
from .cases import Forward, Inputs


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _alignment(prediction: Tensor, target: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(prediction.float(), target.float(), dim=-1)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _linear_cross_entropy(
    hidden: Tensor, unembedding: Tensor, labels: Tensor, softcap: float | None = None
) -> Tensor:
    return F.cross_entropy(_capped(F.linear(hidden, unembedding), softcap), labels)


def _wide_linear_cross_entropy(
    hidden: Tensor, unembedding: Tensor, labels: Tensor, softcap: float | None = None
) -> Tensor:
    return F.cross_entropy(_capped(F.linear(hidden, unembedding).float(), softcap), labels)


def _implicit_token_loss(
    hidden: Tensor, target: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    states = hidden[:-1]
    prediction = F.linear(_swiglu(F.linear(states, gate), F.linear(states, up)), down)
    return _alignment(prediction, target[1:]).mean()


EAGER: dict[str, Forward] = {
    "swiglu": _swiglu,
    "alignment": _alignment,
    "linear_cross_entropy": _linear_cross_entropy,
    "implicit_token_loss": _implicit_token_loss,
}
#: Each of ours is one set of row kernels under the same algorithm.
BACKENDS = {"ours": "native", "ours-triton": "triton", "ours-reference": "reference"}
#: Name -> what it is, in the order of the table.
NAMES = {
    "ours": "nitp_ops, row kernels in C++ (on a GPU CUDA C++)",
    "ours-compiled": "torch.compile of ours",
    "ours-triton": "nitp_ops, row kernels in Triton (on a GPU)",
    "ours-reference": "nitp_ops, backend='reference': its plain equations",
    "eager": "the formula in PyTorch",
    "eager-float32": "the same with the logits cast to float32, as most training code does",
    "compile": "torch.compile of eager",
    **{name: peer.what for name, peer in peers.PEERS.items()},
}
#: What a quick run leaves out, and why.
SLOW = {
    "ours-compiled": "ours stands for it: torch.compile changes what happens between ops, and "
    "each case is one",
    "ours-reference": "eager and eager-float32 stand for it",
    "torch": "its automatic options take up to a minute and a half a step on two cores",
    "cce": "its form for CPU compiles for half a minute",
}


def names_for(op: str) -> list[str]:
    """The implementations of one op: those of the cross-entropy alone beside linear_cross_entropy
    only."""
    own = {"eager-float32", *peers.PEERS}
    return [name for name in NAMES if name not in own or op == "linear_cross_entropy"]


def forward(op: str, name: str) -> Forward:
    """The function behind a name.

    Raises:
        ValueError: this implementation has no such op.
        ImportError: a peer, or something that it needs, is not installed.
    """
    if name not in names_for(op):
        raise ValueError(f"benchmarks: {name!r} has no {op}")
    if name in BACKENDS:
        return partial(getattr(nitp_ops, op), backend=BACKENDS[name])
    if name == "ours-compiled":
        return torch.compile(
            partial(getattr(nitp_ops, op), backend=BACKENDS["ours"]), dynamic=False
        )
    if name == "eager":
        return EAGER[op]
    if name == "eager-float32":
        return _wide_linear_cross_entropy
    if name == "compile":
        return torch.compile(EAGER[op], dynamic=False)
    return peers.forward(name)


def step(function: Forward, inputs: Inputs) -> Tensor:
    """Forward and backward once; the gradients lie on the leaves."""
    value = inputs.forward(function)
    value.backward(inputs.upstream)
    return value.detach()
