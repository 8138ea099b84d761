"""The error budget of every op: |err| <= 1.5 |err of the eager formula| + 2 ulp(output dtype)
|ref|, Frobenius."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# float32: a whole unit in the last place, because sums of this library's GEMMs round up to 1.4
#     times as much as
# MKL's, which eager takes (docs/decisions/0030); the others: half a unit, which the ops keep.
EPS = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-23,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


def outputs(
    function: Callable[..., Any], inputs: Sequence[Tensor], upstream: Tensor | float = 1.0
) -> list[Tensor]:
    """[loss, gradient of every input that requires one] of a fresh call."""
    loss = function(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    gradients = torch.autograd.grad((loss * upstream).sum(), wanted, allow_unused=True)
    filled = [
        torch.zeros_like(x) if g is None else g for x, g in zip(wanted, gradients, strict=True)
    ]
    return [loss.detach(), *filled]


def widened(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The same inputs in float64 (integers and flags as they are)."""
    return [
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for x in inputs
    ]


def within_budget(ours: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """For outputs of realistic size, where a norm averages over many roundings; `exact` is float64."""
    for place, (a, e, ref) in enumerate(zip(ours, eager, exact, strict=True)):
        ref = ref.double()
        error, eager_error = (a.double() - ref).norm().item(), (e.double() - ref).norm().item()
        allowed = 1.5 * eager_error + 2 * EPS[a.dtype] * ref.norm().item()
        assert error <= allowed, (
            f"output {place}: error {error:.3e} over the budget {allowed:.3e}, eager "
            f"{eager_error:.3e}"
        )


NEAR = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def near(
    ours: Sequence[Tensor],
    exact: Sequence[Tensor],
    names: Sequence[str] = (),
    room: Sequence[float] = (),
) -> None:
    """For outputs of any size: equal up to the rounding of the coarsest dtype, with room for
    cancellation.

    room: how far the formula itself is off in these dtypes (`formula_error`); twice that is allowed
        beside."""
    tolerance = max(NEAR[x.dtype] for x in ours)
    for place, (a, ref) in enumerate(zip(ours, exact, strict=True)):
        name = names[place] if place < len(names) else f"output {place}"
        error, allowed = (
            (a.double() - ref.double()).norm().item(),
            tolerance * (ref.double().norm().item() + 0.1),
        )
        allowed += 2 * room[place] if room else 0
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def formula_error(
    function: Callable[..., Any], inputs: Sequence[Tensor], upstream: Tensor | float
) -> list[float]:
    """How far the formula, op by op in the inputs' dtypes, is from float64, at most over eight
    inputs beside these.

    Where the width is 1 a direction hardly turns: gradients through it are small differences of
    large terms."""
    generator, largest = (
        torch.Generator().manual_seed(0),
        [0.0] * (1 + sum(x.requires_grad for x in inputs)),
    )
    for _ in range(8):
        beside = []
        for x in inputs:
            steps = (
                torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device) * 4 - 2
            )
            near_x = (x.detach().double() * (1 + EPS[x.dtype] * steps)).to(x.dtype)
            beside.append(near_x.requires_grad_(x.requires_grad))
        pairs = zip(
            outputs(function, beside, upstream),
            outputs(function, widened(beside), upstream),
            strict=True,
        )
        largest = [
            max(most, (a.double() - b).norm().item())
            for most, (a, b) in zip(largest, pairs, strict=True)
        ]
    return largest


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    """Equal in float64 up to `tolerance` relative to the larger norm."""
    scale = max(a.double().norm().item(), b.double().norm().item(), 1e-300)
    difference = (a.double() - b.double()).norm().item()
    assert difference <= tolerance * scale, (
        f"relative difference {difference / scale:.3e} over {tolerance:g}"
    )
