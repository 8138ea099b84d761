"""The error budget of every op: |err| <= 1.5 |err of the eager formula| + 2 ulp(output dtype) |ref|, Frobenius."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

EPS = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def outputs(function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor | float = 1.0) -> list[Tensor]:
    """[loss, gradient of every input that requires one] of a fresh call."""
    loss = function(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    gradients = torch.autograd.grad((loss * upstream).sum(), wanted, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, gradients, strict=True)]
    return [loss.detach(), *filled]


def widened(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The same inputs in float64 (integers and flags as they are)."""
    return [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]


def within_budget(
    ours: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor], names: Sequence[str] = ()
) -> None:
    """`exact` is float64; a float64 output is compared with it up to 1e-12 of its own size or of 1."""
    for place, (a, e, ref) in enumerate(zip(ours, eager, exact, strict=True)):
        name = names[place] if place < len(names) else f"output {place}"
        ref = ref.double()
        error, eager_error = (a.double() - ref).norm().item(), (e.double() - ref).norm().item()
        ulps = 2 if ref.numel() >= 1024 else 8  # the norm of a few numbers is a few roundings, not their average
        allowed = 1.5 * eager_error + ulps * EPS[a.dtype] * ref.norm().item()
        allowed = 1e-12 * max(1.0, ref.norm().item()) if a.dtype == torch.float64 else allowed
        assert error <= allowed, f"{name}: error {error:.3e} over the budget {allowed:.3e} (eager {eager_error:.3e})"


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    """Equal in float64 up to `tolerance` relative to the larger norm."""
    scale = max(a.double().norm().item(), b.double().norm().item(), 1e-300)
    difference = (a.double() - b.double()).norm().item()
    assert difference <= tolerance * scale, f"relative difference {difference / scale:.3e} over {tolerance:g}"
