"""Errors near cosine one, where the loss is 0.01 and 1 - cos cancels: every dtype mix against the
error budget."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nitp_ops
from nitp_ops import reference
from tests.support.budget import close, outputs, widened
from tests.support.nitp_cases import EVERY_KIND, gate_up_down, matrices, normal, on

NOISE = 0.142  # relative to the prediction: cosine about 1 - NOISE^2 / 2 = 0.99
LOW = [torch.float32, torch.bfloat16, torch.float16]
WIDE = [torch.float64]
DTYPES = WIDE + LOW


def name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def mixes(*sides: list[torch.dtype]) -> list[object]:
    return [pytest.param(*mix, id=" ".join(map(name, mix))) for mix in itertools.product(*sides)]


def near_pair(p_dtype: torch.dtype, z_dtype: torch.dtype, width: int) -> list[Tensor]:
    """Predictions and targets [64, width] at cosine about 0.99, each rounded to its dtype; both
    want a gradient."""
    p = normal(1, 64, width)
    z = p + NOISE * normal(2, 64, width)
    return [p.to(p_dtype).requires_grad_(), z.to(z_dtype).requires_grad_()]


def in_budget(ours: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """The error budget; of a float64 output, where 1 - cos cancels, float64 can only judge 1e-12."""
    for place, (got, same, ref) in enumerate(zip(ours, eager, exact, strict=True)):
        two_ulp = 1e-12 if got.dtype == torch.float64 else torch.finfo(got.dtype).eps
        error, eager_error = ((x.double() - ref).norm().item() for x in (got, same))
        allowed = 1.5 * eager_error + two_ulp * ref.norm().item()
        assert error <= allowed, f"output {place}: error {error:.3e} over the budget {allowed:.3e}"


@pytest.mark.parametrize("width", [64, 1000, 4096])
@pytest.mark.parametrize(("p_dtype", "z_dtype"), mixes(DTYPES, DTYPES))
def test_alignment_at_cosine_0_99_stays_within_the_budget(p_dtype, z_dtype, width):
    """``|err| <= 1.5 |err of 1 - p^.z^, rows in float32| + 2 ulp |ref|`` for the row losses and
    both gradients; rows in float64 where either side is."""
    inputs = near_pair(p_dtype, z_dtype, width)
    upstream = normal(3, 64).to(reference.working(*inputs))
    exact = outputs(reference.alignment, widened(inputs), upstream.double())
    ours, eager = (outputs(book.alignment, inputs, upstream) for book in (nitp_ops, reference))
    assert 0.009 < exact[0].mean() < 0.011
    assert [x.dtype for x in ours] == [reference.working(*inputs), p_dtype, z_dtype]
    in_budget(ours, eager, exact)


@pytest.mark.parametrize("width", [64, 1000, 4096])
def test_the_naive_bfloat16_formula_fails_the_same_budget(width):
    """``1 - cosine_similarity(p, z)`` in bfloat16 knows multiples of 2^-8 = 0.004 near a loss of
    0.01: every output leaves the budget, the loss by more than tenfold."""
    inputs, upstream = near_pair(torch.bfloat16, torch.bfloat16, width), normal(3, 64).float()

    def naive(p: Tensor, z: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(p, z, dim=-1)

    exact = outputs(reference.alignment, widened(inputs), upstream.double())
    eager, got = outputs(reference.alignment, inputs, upstream), outputs(naive, inputs, upstream)
    assert got[0].dtype == torch.bfloat16 and torch.equal(got[0] * 256, (got[0] * 256).round())
    for output in zip(got, eager, exact, strict=True):
        with pytest.raises(AssertionError, match="over the budget"):
            in_budget(*([x] for x in output))
    error = (got[0].double() - exact[0]).norm()
    assert error > 10 * (1.5 * (eager[0].double() - exact[0]).norm() + 2**-7 * exact[0].norm())


def near_problem(
    kind: str, hidden: torch.dtype, target: torch.dtype, weight: torch.dtype
) -> list[Tensor]:
    """[hidden [2, 40, 64], target, matrices...]: the target at cosine about 0.99 from what it is
    predicted by."""
    h = normal(1, 2, 40, 64).to(hidden)
    weights = [w.detach().to(weight) for w in matrices(kind, 2, 64, 64, 256)]
    p = reference.projection(h.double(), *gate_up_down([w.double() for w in weights]))
    noise = NOISE / 8 * p.norm(dim=-1, keepdim=True) * normal(9, 2, 40, 64)  # 8 = sqrt(64)
    z = (p + noise).roll(1, -2).to(target)
    return [h.requires_grad_(), z, *(w.requires_grad_() for w in weights)]


@EVERY_KIND
@pytest.mark.parametrize(
    ("hidden", "target", "weight"), mixes(LOW, DTYPES, LOW) + mixes(WIDE, DTYPES, WIDE)
)
def test_implicit_token_loss_at_cosine_0_99_stays_within_the_budget(hidden, target, weight, kind):
    """GEMMs in the weight's dtype, rows in float32 (float64 beside a float64 target), gradients
    in their inputs'."""
    inputs = near_problem(kind, hidden, target, weight)
    work = reference.working(*inputs)
    upstream = normal(3, 2, 40).to(work)
    rows = {"reduction": "none"}
    exact = outputs(on(reference.implicit_token_loss, **rows), widened(inputs), upstream.double())
    eager = outputs(on(reference.implicit_token_loss, **rows), inputs, upstream)
    ours = outputs(on(nitp_ops.implicit_token_loss, **rows, chunk_bytes=2**16), inputs, upstream)
    assert 0.009 < exact[0][:, :-1].mean() < 0.011
    assert [x.dtype for x in ours] == [work, *(x.dtype for x in inputs if x.requires_grad)]
    in_budget(ours, eager, exact)
    # gradients formed in the forward pass; the scalar itself is the row losses' mean, rounded once
    exact, eager = (
        outputs(on(reference.implicit_token_loss), x) for x in (widened(inputs), inputs)
    )
    mean = outputs(on(nitp_ops.implicit_token_loss, chunk_bytes=2**16), inputs)
    in_budget(mean[1:], eager[1:], exact[1:])
    close(mean[0], ours[0].sum(dtype=torch.float64) / (2 * 39), 4 * torch.finfo(work).eps)


@pytest.mark.parametrize(("hidden", "weight"), mixes(WIDE, LOW) + mixes(LOW, WIDE))
def test_float64_does_not_mix_between_hidden_state_and_matrices(hidden, weight):
    """A float64 GEMM of a rounded operand would only look exact."""
    with pytest.raises(
        TypeError,
        match=rf"gate is {name(weight)}, expected {name(hidden)} "
        r"\(float64 does not mix",
    ):
        on(nitp_ops.implicit_token_loss)(*near_problem("swiglu", hidden, torch.float32, weight))
