"""What is measured: each op's inputs, its sizes, and the floor that its time is divided by.

The floor of a GEMM-bound op is its own matrix products, called alone with outputs that exist already. The floor of a
memory-bound op is one `copy_` that moves as many bytes as forward and backward must read and write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Sizes = dict[str, int]
Floor = Callable[[], None]
#: (n, k, m) of each linear layer [n, k] -> [n, m].
Layers = list[tuple[int, int, int]]
Product = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Inputs:
    """Arguments of one op by name, and the gradient that backward starts from (None: 1)."""

    arguments: dict[str, Tensor]
    upstream: Tensor | None = None

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The arguments that want a gradient."""
        return {name: tensor for name, tensor in self.arguments.items() if tensor.requires_grad}

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
        return Inputs(arguments, None if self.upstream is None else converted(self.upstream))


@dataclass(frozen=True)
class Op:
    """One op: how to make its inputs and its floor on the default device, at which sizes (toy: for tests), and how
    many rows the float64 check takes. layers: the products of a GEMM-bound op, None where it is memory-bound."""

    name: str
    floor_name: str
    inputs: Callable[[Sizes, torch.dtype], Inputs]
    floor: Callable[[Sizes, torch.dtype], Floor]
    full: tuple[Sizes, ...]
    quick: tuple[Sizes, ...]
    cuda: tuple[Sizes, ...]
    toy: Sizes
    error_rows: int
    layers: Callable[[Sizes], Layers] | None = None


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(device=torch.get_default_device()).manual_seed(seed)


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=_generator(seed)).mul_(scale).to(dtype)


def _leaf(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return _random(shape, dtype, seed, scale).requires_grad_()


def products(layers: Layers, dtype: torch.dtype) -> list[Product]:
    """(left, right, out) of the three products of each linear layer: output, input gradient, weight gradient."""
    calls = []
    for n, k, m in layers:
        x, weight = _random((n, k), dtype, n), _random((m, k), dtype, m, k**-0.5)
        out = torch.empty(n, m, dtype=dtype)
        d_x, d_weight = torch.empty_like(x), torch.empty_like(weight)
        calls += [(x, weight.T, out), (out, weight, d_x), (out.T, x, d_weight)]
    return calls


def _products(layers: Layers, dtype: torch.dtype) -> Floor:
    calls = products(layers, dtype)

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
        }
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
    return Inputs({"prediction": prediction, "target": target}, _random(shape[:1], torch.float32, 2))


def _alignment_floor(sizes: Sizes, dtype: torch.dtype) -> Floor:
    return _copy(5 * sizes["N"] * sizes["D"], dtype)


def _swiglu_inputs(sizes: Sizes, dtype: torch.dtype) -> Inputs:
    shape = sizes["N"], sizes["m"]
    return Inputs({"gate": _leaf(shape, dtype, 0), "up": _leaf(shape, dtype, 1)}, _random(shape, dtype, 2))


def _swiglu_floor(sizes: Sizes, dtype: torch.dtype) -> Floor:
    return _copy(8 * sizes["N"] * sizes["m"], dtype)


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "swiglu",
            "copy of the same bytes: 8 N m numbers (forward reads 2, writes 1; backward reads 3, writes 2)",
            _swiglu_inputs,
            _swiglu_floor,
            full=({"N": 8192, "m": 4096},),
            quick=({"N": 2048, "m": 2048},),
            cuda=({"N": 2048, "m": 2048}, {"N": 16384, "m": 8192}),
            toy={"N": 6, "m": 8},
            error_rows=512,
        ),
        Op(
            "alignment",
            "copy of the same bytes: 5 N D numbers (forward reads 2; backward reads 2, writes 1)",
            _alignment_inputs,
            _alignment_floor,
            full=({"N": 8192, "D": 1024}, {"N": 8192, "D": 2048}, {"N": 8192, "D": 4096}),
            quick=({"N": 4096, "D": 1024},),
            cuda=({"N": 4096, "D": 1024}, {"N": 65536, "D": 4096}),
            toy={"N": 6, "D": 8},
            error_rows=512,
        ),
        Op(
            "linear_cross_entropy",
            "its 3 GEMMs",
            _linear_cross_entropy_inputs,
            _linear_cross_entropy_floor,
            full=({"N": 2048, "d": 512, "V": 32768}, {"N": 1024, "d": 896, "V": 151936}),
            quick=({"N": 512, "d": 256, "V": 32768},),
            cuda=(
                {"N": 4096, "d": 4096, "V": 128256},
                {"N": 8192, "d": 4096, "V": 128256},
                {"N": 16384, "d": 2048, "V": 151936},
            ),
            toy={"N": 6, "d": 8, "V": 20},
            error_rows=256,
            layers=_linear_cross_entropy_layers,
        ),
        Op(
            "implicit_token_loss",
            "its 9 GEMMs (m = 4 d)",
            _implicit_token_loss_inputs,
            _implicit_token_loss_floor,
            full=({"N": 4096, "d": 512}, {"N": 2048, "d": 2048}),
            quick=({"N": 1024, "d": 256},),
            cuda=({"N": 16384, "d": 1280}, {"N": 16384, "d": 2048}, {"N": 8192, "d": 4096}),
            toy={"N": 6, "d": 8},
            error_rows=512,
            layers=_implicit_token_loss_layers,
        ),
    )
}
