"""What is measured: each op's inputs, its sizes, and the floor that its time is divided by.

The floor of a GEMM-bound op is its own GEMMs, called alone with outputs that exist already; that of
a memory-bound op is one `copy_` of the bytes that forward and backward must read and write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nitp_ops.core.chunking import row_stride

from .model_shapes import HEADS, PROJECTORS

Sizes = dict[str, int]
Floor = Callable[[], None]
Forward = Callable[..., Tensor]
#: (n, k, m) of each linear layer [n, k] -> [n, m].
Layers = list[tuple[int, int, int]]
Gemm = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Inputs:
    """Arguments of one op by name, the upstream gradient (None: 1), options that are no tensors."""

    arguments: dict[str, Tensor]
    upstream: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The arguments that want a gradient."""
        return {name: tensor for name, tensor in self.arguments.items() if tensor.requires_grad}

    def forward(self, function: Forward) -> Tensor:
        """The value of `function` here."""
        return function(**self.arguments, **self.options)

    def clear(self) -> None:
        """Drop the gradients of the last step."""
        for leaf in self.leaves.values():
            leaf.grad = None

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another floating point dtype, as new leaves."""

        def converted(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)

        arguments = {name: converted(tensor) for name, tensor in self.arguments.items()}
        return Inputs(
            arguments, None if self.upstream is None else converted(self.upstream), self.options
        )


@dataclass(frozen=True)
class Op:
    """One op: its inputs and its floor on the default device, at which sizes (toy: for tests).

    layers: the GEMMs of a GEMM-bound op, else None. moved: numbers that it must read or write."""

    name: str
    floor_name: str
    inputs: Callable[[Sizes, torch.dtype], Inputs]
    floor: Callable[[Sizes, torch.dtype], Floor]
    full: dict[str, Sizes]
    quick: dict[str, Sizes]
    cuda: dict[str, Sizes]
    toy: Sizes
    error_rows: int
    moved: Callable[[Sizes], int]
    layers: Callable[[Sizes], Layers] | None = None

    def flops(self, sizes: Sizes) -> int:
        """Of the GEMMs of forward and backward, two a multiply-add; 0 for a memory-bound op."""
        return sum(6 * n * k * m for n, k, m in self.layers(sizes)) if self.layers else 0

    def least_bytes(self, sizes: Sizes, dtype: torch.dtype) -> int:
        """That forward and backward must read or write: inputs and gradients once each."""
        return self.moved(sizes) * dtype.itemsize


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(device=torch.get_default_device()).manual_seed(seed)


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=_generator(seed)).mul_(scale).to(dtype)


def _leaf(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return _random(shape, dtype, seed, scale).requires_grad_()


def gemms(layers: Layers, dtype: torch.dtype) -> list[Gemm]:
    """(left, right, out) of each linear layer's GEMMs: output, input gradient, weight gradient.
    Rows of the output are as far apart as the library's rows of logits."""
    calls = []
    for n, k, m in layers:
        x, weight = _random((n, k), dtype, n), _random((m, k), dtype, m, k**-0.5)
        out = torch.empty(n, row_stride(m, torch.get_default_device().type), dtype=dtype)[:, :m]
        d_x, d_weight = torch.empty_like(x), torch.empty_like(weight)
        calls += [(x, weight.T, out), (out, weight, d_x), (out.T, x, d_weight)]
    return calls


def _products(layers: Layers, dtype: torch.dtype) -> Floor:
    calls = gemms(layers, dtype)

    def run() -> None:
        for left, right, out in calls:
            torch.mm(left, right, out=out)

    return run


def _copy(elements: int, dtype: torch.dtype) -> Floor:
    """A copy that reads and writes `elements` numbers in all."""
    source = torch.ones(elements // 2, dtype=dtype)
    destination = torch.zeros_like(source)

    def run() -> None:
        destination.copy_(source)

    return run


def _linear_cross_entropy_inputs(sizes: Sizes, dtype: torch.dtype) -> Inputs:
    n, d, v = sizes["N"], sizes["d"], sizes["V"]
    labels = torch.randint(v, (n,), generator=_generator(2))
    return Inputs(
        {
            "hidden": _leaf((n, d), dtype, 0),
            "unembedding": _leaf((v, d), dtype, 1, d**-0.5),
            "labels": labels,
        },
        options={"softcap": float(sizes["softcap"])} if "softcap" in sizes else {},
    )


def _linear_cross_entropy_layers(sizes: Sizes) -> Layers:
    return [(sizes["N"], sizes["d"], sizes["V"])]


def _linear_cross_entropy_floor(sizes: Sizes, dtype: torch.dtype) -> Floor:
    return _products(_linear_cross_entropy_layers(sizes), dtype)


def _implicit_token_loss_inputs(sizes: Sizes, dtype: torch.dtype) -> Inputs:
    n, d = sizes["N"], sizes["d"]
    m = 4 * d
    return Inputs(
        {
            "hidden": _leaf((n, d), dtype, 0),
            "target": _random((n, d), dtype, 1),
            "gate": _leaf((m, d), dtype, 2, d**-0.5),
            "up": _leaf((m, d), dtype, 3, d**-0.5),
            "down": _leaf((d, m), dtype, 4, m**-0.5),
        }
    )


def _implicit_token_loss_layers(sizes: Sizes) -> Layers:
    n, d = sizes["N"], sizes["d"]
    return [(n, d, 4 * d), (n, d, 4 * d), (n, 4 * d, d)]


def _implicit_token_loss_floor(sizes: Sizes, dtype: torch.dtype) -> Floor:
    return _products(_implicit_token_loss_layers(sizes), dtype)


def _alignment_inputs(sizes: Sizes, dtype: torch.dtype) -> Inputs:
    shape = sizes["N"], sizes["D"]
    prediction, target = _leaf(shape, dtype, 0), _random(shape, dtype, 1)
    return Inputs(
        {"prediction": prediction, "target": target}, _random(shape[:1], torch.float32, 2)
    )


def _alignment_floor(sizes: Sizes, dtype: torch.dtype) -> Floor:
    return _copy(_alignment_moved(sizes), dtype)


def _swiglu_inputs(sizes: Sizes, dtype: torch.dtype) -> Inputs:
    shape = sizes["N"], sizes["m"]
    return Inputs(
        {"gate": _leaf(shape, dtype, 0), "up": _leaf(shape, dtype, 1)}, _random(shape, dtype, 2)
    )


def _swiglu_floor(sizes: Sizes, dtype: torch.dtype) -> Floor:
    return _copy(_swiglu_moved(sizes), dtype)


def _linear_cross_entropy_moved(sizes: Sizes) -> int:
    return 2 * (sizes["N"] + sizes["V"]) * sizes["d"]


def _implicit_token_loss_moved(sizes: Sizes) -> int:
    return 3 * sizes["N"] * sizes["d"] + 2 * 12 * sizes["d"] ** 2


def _alignment_moved(sizes: Sizes) -> int:
    return 5 * sizes["N"] * sizes["D"]


def _swiglu_moved(sizes: Sizes) -> int:
    return 8 * sizes["N"] * sizes["m"]


#: Rows of a head on CPU: enough that the GEMMs are bound by arithmetic.
ROWS = 512

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "swiglu",
            "copy of the same bytes: 8 N m numbers (forward reads 2, writes 1; backward reads 3, "
            "writes 2)",
            _swiglu_inputs,
            _swiglu_floor,
            full={
                name: {"N": 4096, "m": 4 * PROJECTORS[name].width}
                for name in ("NITP-MoE-3B", "NITP-MoE-9B")
            },
            quick={"NITP-MoE-1.9B": {"N": 2048, "m": 2048}},
            cuda={"NITP-MoE-1.9B": {"N": 2048, "m": 2048}, "d=2048": {"N": 16384, "m": 8192}},
            toy={"N": 6, "m": 8},
            error_rows=512,
            moved=_swiglu_moved,
        ),
        Op(
            "alignment",
            "copy of the same bytes: 5 N D numbers (forward reads 2; backward reads 2, writes 1)",
            _alignment_inputs,
            _alignment_floor,
            full={
                name: {"N": 8192, "D": PROJECTORS[name].width}
                for name in ("NITP-MoE-9B", "NITP-MoE-45B")
            },
            quick={"NITP-MoE-9B": {"N": 4096, "D": 1280}},
            cuda={"d=1024": {"N": 4096, "D": 1024}, "Llama-3-8B": {"N": 65536, "D": 4096}},
            toy={"N": 6, "D": 8},
            error_rows=512,
            moved=_alignment_moved,
        ),
        Op(
            "linear_cross_entropy",
            "its 3 GEMMs",
            _linear_cross_entropy_inputs,
            _linear_cross_entropy_floor,
            full={name: head.sizes(ROWS) for name, head in HEADS.items()},
            quick={"GPT-2": HEADS["GPT-2"].sizes(256)},
            cuda={
                "Llama-3-8B, N=4096": HEADS["Llama-3-8B"].sizes(4096),
                "Llama-3-8B": HEADS["Llama-3-8B"].sizes(8192),
                "d=2048": {"N": 16384, "d": 2048, "V": 151936},
                "NITP-MoE-9B": HEADS["NITP-MoE-9B"].sizes(16384),
                "Gemma-2-2B": HEADS["Gemma-2-2B"].sizes(8192),
                "DeepSeek-V3": HEADS["DeepSeek-V3"].sizes(8192),
            },
            toy={"N": 6, "d": 8, "V": 20},
            error_rows=256,
            moved=_linear_cross_entropy_moved,
            layers=_linear_cross_entropy_layers,
        ),
        Op(
            "implicit_token_loss",
            "its 9 GEMMs (m = 4 d)",
            _implicit_token_loss_inputs,
            _implicit_token_loss_floor,
            full={name: {"N": 2048, "d": head.width} for name, head in PROJECTORS.items()},
            quick={"NITP-MoE-1.9B": {"N": 512, "d": 512}},
            cuda={
                "NITP-MoE-9B": {"N": 16384, "d": 1280},
                "d=2048": {"N": 16384, "d": 2048},
                "Llama-3-8B": {"N": 8192, "d": 4096},
            },
            toy={"N": 6, "d": 8},
            error_rows=512,
            moved=_implicit_token_loss_moved,
            layers=_implicit_token_loss_layers,
        ),
    )
}


def heading(op: Op, name: str, sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    """What a result says about its case: op, name, sizes, dtype, FLOPs of the GEMMs, least bytes."""
    kept = {"op": op.name, "name": name, "sizes": sizes, "dtype": str(dtype).removeprefix("torch.")}
    return kept | {"flops": op.flops(sizes), "least_bytes": op.least_bytes(sizes, dtype)}
