"""Rows whose squares overflow or vanish in the arithmetic on them: their directions are as good as
any."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nitp_ops
from nitp_ops import reference
from tests.support.budget import EPS

BACKENDS = pytest.mark.parametrize("backend", [None, "reference"])
#: Powers of two that the sides are multiplied by; for small rows eps is smaller still.
FLOAT32_RANGE = [(100, 0), (0, 100), (62, 63), (118, 118), (100, -12), (-100, -90)]
SIZES = [(dtype, *size) for dtype in (torch.float32, torch.bfloat16) for size in FLOAT32_RANGE]
SIZES += [(torch.float64, *size) for size in [(1000, 0), (0, 1010), (600, -8), (-800, -700)]]


def pairs(dtype: torch.dtype, columns: int = 33) -> tuple[Tensor, Tensor]:
    """Four pairs of rows with cosines from near -1 to near 1."""
    p = torch.randn(4, columns, dtype=torch.float64)
    z = (
        torch.randn(4, columns, dtype=torch.float64)
        + torch.tensor([[-4.0], [0.0], [1.0], [30.0]]) * p
    )
    return p.to(dtype), z.to(dtype)


def aligned(p: Tensor, z: Tensor, eps: float, backend: str | None) -> list[Tensor]:
    """[loss, gradients of both] under an upstream of one."""
    p, z = p.clone().requires_grad_(), z.clone().requires_grad_()
    loss = nitp_ops.alignment(p, z, eps=eps, backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), (p, z))]


@BACKENDS
@pytest.mark.parametrize(("dtype", "of_p", "of_z"), SIZES)
def test_a_cosine_does_not_change_with_the_size_of_a_row(dtype, of_p, of_z, backend):
    """Nor do the gradients, but for their size: a power of two rounds nothing."""
    p, z = pairs(dtype)
    eps = (
        1e-6
        if min(of_p, of_z) > -20
        else float(torch.finfo(torch.promote_types(dtype, torch.float32)).tiny)
    )
    loss, dp, dz = aligned(
        torch.ldexp(p, torch.tensor(of_p)), torch.ldexp(z, torch.tensor(of_z)), eps, backend
    )
    expected, expected_dp, expected_dz = aligned(p, z, eps, backend)
    torch.testing.assert_close(loss, expected, rtol=4 * EPS[loss.dtype], atol=4 * EPS[loss.dtype])
    for gradient, size, like in ((dp, of_p, expected_dp), (dz, of_z, expected_dz)):
        # back in two steps: a factor of 2^122 times a gradient of 2^-122 has room, its inverse in
        # bfloat16 has not
        half = torch.tensor(size // 2), torch.tensor(size - size // 2)
        scaled = torch.ldexp(torch.ldexp(gradient.double(), half[0]), half[1])
        torch.testing.assert_close(scaled, like.double(), rtol=8 * EPS[dtype], atol=8 * EPS[dtype])


@BACKENDS
def test_stats_hold_the_norms_of_large_rows(backend):
    p, z = pairs(torch.float32)
    large, small = 2.0**80 * p.unsqueeze(0), z.unsqueeze(0)
    for distance in ("cosine", "mse", "kl"):
        loss, stats = nitp_ops.implicit_token_loss(
            large, small, shift=0, distance=distance, return_stats=True, backend=backend
        )
        torch.testing.assert_close(stats.prediction_norm[0], 2.0**80 * p.norm(dim=-1))
        torch.testing.assert_close(stats.target_norm[0], z.norm(dim=-1))
        torch.testing.assert_close(
            stats.cosine[0], torch.nn.functional.cosine_similarity(p, z, dim=-1)
        )
        assert distance == "mse" or loss.isfinite()


@BACKENDS
def test_a_large_row_beside_infinity_stays_nan(backend):
    p = torch.tensor([[2.0**100, torch.inf], [2.0**100, torch.nan]])
    loss, *_ = aligned(p, torch.ones(2, 2), 1e-6, backend)
    assert loss.isnan().all()


@BACKENDS
def test_kl_of_logits_as_far_apart_as_float32_goes(backend):
    """0 log 0 = 0, where the difference of the logits overflows."""
    p = torch.tensor([[3e38, -3e38, 1.0], [1.0, 2.0, 3.0]], requires_grad=True)
    z = torch.tensor([[2.0, -3e38, -3e38], [3e38, 0.0, -3e38]], requires_grad=True)
    loss = nitp_ops.alignment(p, z, distance="kl", backend=backend)
    log_q = torch.tensor([1.0, 2.0, 3.0]).log_softmax(0)
    torch.testing.assert_close(loss, torch.stack([torch.tensor(0.0), -log_q[0]]))
    dp, dz = torch.autograd.grad(loss.sum(), (p, z))
    torch.testing.assert_close(dp[1], log_q.exp() - torch.tensor([1.0, 0.0, 0.0]))
    assert not dp[0].any() and not dz.any()


def test_the_norm_of_the_reference_has_the_whole_range():
    x = torch.tensor([[3.0, 4.0]]) * torch.tensor([[0.0], [2.0**-140], [1.0], [2.0**120]])
    x.requires_grad_()
    norm = reference.norm(x)
    torch.testing.assert_close(norm, torch.tensor([0.0, 5 * 2.0**-140, 5.0, 5 * 2.0**120]))
    (gradient,) = torch.autograd.grad(norm.sum(), x)
    torch.testing.assert_close(
        gradient, torch.tensor([[0.0, 0.0], [0.6, 0.8], [0.6, 0.8], [0.6, 0.8]])
    )
