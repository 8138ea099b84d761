"""Under weights and upstream gradients of zero: what stands in such rows reaches no other number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import nitp_ops
from nitp_ops import CrossEntropyTerm
from tests.core.without_reading import without_reading

NAN, INF = float("nan"), float("inf")
LABELS = torch.tensor([1, 2, 5, 4, 10])
CHUNKS = pytest.mark.parametrize("chunk_bytes", [None, 1, 2 * 11 * 4])
BACKENDS = pytest.mark.parametrize("backend", [None, "reference"])


def head(value: float = 0.0) -> tuple[Tensor, Tensor]:
    """Hidden states [5, 6] and an unembedding [11, 6], one row of which holds `value` where that is
    not finite."""
    hidden, weight = torch.randn(5, 6), torch.randn(11, 6)
    if value != 0:
        weight[7, 3] = value
    return hidden.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("on_gpu", [False, True])
@CHUNKS
def test_a_row_of_weight_zero_has_no_gradient_whatever_the_unembedding_holds(
    chunk_bytes, on_gpu, value
):
    hidden, weight = head(value)
    token_weight = torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0])
    labels = LABELS.clone()
    labels[2] = -100

    def loss() -> Tensor:
        return nitp_ops.linear_cross_entropy(
            hidden, weight, labels, token_weight=token_weight, chunk_bytes=chunk_bytes
        )

    if on_gpu:
        with without_reading():
            (gradient,) = torch.autograd.grad(loss(), hidden)
    else:
        (gradient,) = torch.autograd.grad(loss(), hidden)
    assert not gradient[[1, 2, 3]].any()
    assert gradient[[0, 4]].isnan().any(-1).all()


@CHUNKS
def test_so_has_a_row_of_one_job_beside_rows_of_another(chunk_bytes):
    hidden, weight = head(INF)
    other = torch.randn(3, 6, requires_grad=True)
    jobs = [
        CrossEntropyTerm(hidden, LABELS, token_weight=torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])),
        CrossEntropyTerm(other, LABELS[:3]),
    ]
    loss, _ = nitp_ops.grouped_linear_cross_entropy(jobs, weight, chunk_bytes=chunk_bytes)
    ours, theirs = torch.autograd.grad(loss, (hidden, other))
    assert (
        not ours[[1, 4]].any()
        and ours[[0, 2, 3]].isnan().any(-1).all()
        and theirs.isnan().any(-1).all()
    )


@BACKENDS
@CHUNKS
@pytest.mark.parametrize("kind", ["class_weight", "target_weight"])
def test_a_row_whose_targets_weigh_nothing_is_silent_too(kind, chunk_bytes, backend):
    """Its hidden state may hold a NaN; a z-loss, or class weights under label smoothing, wake it."""
    hidden, weight = head()
    spoiled = hidden.detach().clone()
    spoiled[1] = NAN
    spoiled.requires_grad_()
    options: dict[str, Any]
    if kind == "class_weight":
        options = {"class_weight": torch.ones(11).index_fill(0, LABELS[1:2], 0.0)}
        labels = LABELS
    else:
        labels = torch.stack([LABELS, LABELS.flip(0)], -1)
        options = {
            "target_weight": torch.ones(5, 2).index_fill(0, torch.tensor([1]), 0.0),
            "label_smoothing": 0.1,
        }

    def call(states: Tensor, **more: Any) -> list[Tensor]:
        loss = nitp_ops.linear_cross_entropy(
            states, weight, labels, chunk_bytes=chunk_bytes, backend=backend, **(options | more)
        )
        return [loss, *torch.autograd.grad(loss, (states, weight))]

    for clean, other in zip(call(hidden), call(spoiled), strict=True):
        torch.testing.assert_close(other, clean, rtol=0, atol=0)
    assert call(spoiled, z_loss=0.1)[0].isnan()
    if kind == "class_weight":
        assert call(spoiled, label_smoothing=0.1)[0].isnan()


def test_an_invalid_pair_has_no_gradient_whatever_the_projector_holds():
    hidden, target = torch.randn(1, 6, 4, requires_grad=True), torch.randn(1, 6, 4)
    gate, up, down = torch.randn(8, 4), torch.randn(8, 4), torch.randn(4, 8)
    down[2, 3] = INF
    valid = torch.tensor([[True, False, True, False, True, True]])
    with without_reading():
        loss = nitp_ops.implicit_token_loss(hidden, target, gate, up, down, valid=valid)
        (gradient,) = torch.autograd.grad(loss, hidden)
    assert not gradient[0, [1, 3, 5]].any() and gradient[0, [0, 2, 4]].isnan().any(-1).all()


def losses(hidden: Tensor, weight: Tensor, **buffers: Any) -> dict[str, Tensor]:
    """Losses over one hidden state that is NaN."""
    of_hidden = {name: buffer for name, buffer in buffers.items() if name == "hidden_grad_out"}
    return {
        "token": nitp_ops.linear_cross_entropy(hidden, weight, LABELS, **buffers),
        "rows": nitp_ops.linear_cross_entropy(
            hidden, weight, LABELS, reduction="none", **buffers
        ).sum(),
        "latent": nitp_ops.implicit_token_loss(hidden, torch.ones_like(hidden), **of_hidden),
    }


@pytest.mark.parametrize("name", ["token", "rows", "latent"])
def test_an_upstream_of_zero_leaves_no_nan_of_a_stored_gradient(name):
    hidden, weight = head()
    with torch.no_grad():
        hidden[1] = NAN
    wanted = (hidden,) if name == "latent" else (hidden, weight)
    for create_graph in (False, True):
        # as a guarded loss does
        loss = 0.0 * torch.where(torch.tensor(True), 1.0, losses(hidden, weight)[name])
        for gradient in torch.autograd.grad(loss, wanted, create_graph=create_graph):
            assert not gradient.any()
    buffers = {"hidden_grad_out": torch.ones(5, 6), "weight_grad_out": torch.ones(11, 6)}
    if name == "latent":
        del buffers["weight_grad_out"]
    loss = losses(hidden, weight, **buffers)[name]
    loss.backward(torch.zeros_like(loss))
    assert all(torch.equal(buffer, torch.ones_like(buffer)) for buffer in buffers.values())


def test_a_compiled_upstream_of_zero_leaves_no_nan_either():
    torch.use_deterministic_algorithms(False)
    hidden, weight = head()
    with torch.no_grad():
        hidden[1] = NAN
    buffer = torch.ones(5, 6)

    def call(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
        plain = nitp_ops.linear_cross_entropy(hidden, weight, LABELS)
        return plain + nitp_ops.linear_cross_entropy(hidden, weight, LABELS, hidden_grad_out=buffer)

    loss = torch.compile(call, backend="aot_eager", fullgraph=True)(hidden, weight, buffer)
    for gradient in torch.autograd.grad(loss, (hidden, weight), torch.zeros_like(loss)):
        assert not gradient.any()
    assert torch.equal(buffer, torch.ones(5, 6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_scale_of_zero_writes_zeros_over_nan_and_infinity(dtype):
    rows = torch.tensor([[NAN, INF, -INF, 1.0] * 9, [2.0] * 36]).to(dtype)
    factor = torch.zeros((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    torch.ops.nitp_ops.scale_rows_(rows, factor)
    assert torch.equal(rows, torch.zeros_like(rows))
