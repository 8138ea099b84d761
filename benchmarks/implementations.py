"""Who computes: our op, the formula as one writes it in PyTorch, that formula compiled, and PyTorch's own op.

Every function takes the arguments of `cases.Inputs` by name. Cosine losses are formed in float32, as the formula must
be (bfloat16 numbers just below 1 are 0.004 apart); logits stay in the dtype of the product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import nitp_ops

from .cases import Inputs

Forward = Callable[..., Tensor]


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _alignment(prediction: Tensor, target: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(prediction.float(), target.float(), dim=-1)


def _linear_cross_entropy(hidden: Tensor, unembedding: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, unembedding), labels)


def _chunked_linear_cross_entropy(hidden: Tensor, unembedding: Tensor, labels: Tensor) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, unembedding, labels, options=options)


def _implicit_token_loss(hidden: Tensor, target: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    states = hidden[:-1]
    prediction = F.linear(_swiglu(F.linear(states, gate), F.linear(states, up)), down)
    return _alignment(prediction, target[1:]).mean()


EAGER: dict[str, Forward] = {
    "swiglu": _swiglu,
    "alignment": _alignment,
    "linear_cross_entropy": _linear_cross_entropy,
    "implicit_token_loss": _implicit_token_loss,
}

#: Name -> what it is, in the order of the table.
NAMES = {
    "ours": "nitp_ops",
    "eager": "the formula in PyTorch",
    "compile": "torch.compile of that formula",
    "torch": "PyTorch's own fused op, with its automatic options",
}
#: On CUDA each of ours is one set of row kernels under the same algorithm.
BACKENDS = {"ours": "native", "ours-triton": "triton"}
CUDA_NAMES = {
    "ours": "nitp_ops, row kernels in CUDA C++",
    "ours-triton": "nitp_ops, row kernels in Triton",
    **{name: NAMES[name] for name in ("eager", "compile", "torch")},
}


def names_for(op: str, quick: bool) -> list[str]:
    """The implementations of one op; PyTorch's own takes seconds a step on CPU and stays out of a quick run."""
    return [name for name in NAMES if name != "torch" or (op == "linear_cross_entropy" and not quick)]


def forward(op: str, name: str) -> Forward:
    """The function behind a name.

    Raises:
        ValueError: this implementation has no such op.
    """
    if name == "ours":
        return getattr(nitp_ops, op)
    if name == "eager":
        return EAGER[op]
    if name == "compile":
        return torch.compile(EAGER[op], dynamic=False)
    if name == "torch" and op == "linear_cross_entropy":
        return _chunked_linear_cross_entropy
    raise ValueError(f"benchmarks: {name!r} has no {op}")


def step(function: Forward, inputs: Inputs) -> Tensor:
    """Forward and backward once; the gradients lie on the leaves."""
    value = function(**inputs.arguments)
    value.backward(inputs.upstream)
    return value.detach()
