"""cross_entropy with inplace_gradient: the gradient overwrites the logits."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import nitp_ops
from nitp_ops.kernels.torch_rows import blocks
from tests.ops.cross_entropy.test_cross_entropy import BACKENDS, loss_of, make
from tests.support.budget import close, outputs


@BACKENDS
def test_the_gradient_stands_where_the_logits_were(backend):
    leaf, labels = make()
    logits = leaf * 1
    before = logits.detach().clone()
    loss = nitp_ops.cross_entropy(logits, labels, inplace_gradient=True, backend=backend)
    assert torch.equal(logits, before)  # until the backward pass
    (gradient,) = torch.autograd.grad(loss, logits, 0.37 * torch.ones_like(loss))
    assert gradient.data_ptr() == logits.data_ptr()
    expected = outputs(loss_of(nitp_ops, labels, backend=backend), [leaf], 0.37)[1]
    assert torch.equal(gradient, expected) and torch.equal(logits.detach(), expected)


class Unseen:
    """Row kernels whose writes autograd does not see, as Triton's."""

    prepare_rows_, finish_rows_ = torch.ops.nitp_ops.prepare_rows_, torch.ops.nitp_ops.finish_rows_

    @staticmethod
    def cross_entropy_rows_(logits, *rest):
        torch.ops.nitp_ops.cross_entropy_rows_(logits.data, *rest)


def test_a_later_use_of_overwritten_logits_raises(monkeypatch):
    monkeypatch.setattr(nitp_ops.kernels.select, "row_kernels", lambda backend: Unseen)
    leaf, labels = make()
    logits = leaf * 1
    loss = nitp_ops.cross_entropy(logits, labels, inplace_gradient=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = leaf * 1
    both = logits.exp().sum(), nitp_ops.cross_entropy(logits, labels, inplace_gradient=True)
    other = logits.square().sum()
    torch.autograd.grad(both[1], logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(other, logits)


def test_logits_that_something_else_changed_are_refused_in_the_backward_pass():
    leaf, labels = make()
    logits = leaf * 1
    loss = nitp_ops.cross_entropy(logits, labels)
    with torch.no_grad():
        logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_reading_the_logits_leaves_their_version():
    logits, labels = make()
    version = logits._version
    nitp_ops.cross_entropy(logits, labels).backward()
    assert logits._version == version


@BACKENDS
@pytest.mark.parametrize(("overwrite", "gradients"), [(False, 1), (True, 0)])
def test_the_memory_is_one_gradient_or_none(overwrite, gradients, backend, monkeypatch):
    monkeypatch.setattr(nitp_ops.ops.cross_entropy.logits.autograd, "LEAST_BYTES", 2**16)
    monkeypatch.setattr(blocks, "BLOCK", 2**12)
    leaf, labels = make(1024, 500, torch.bfloat16)
    logits = leaf * 1
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = nitp_ops.cross_entropy(logits, labels, inplace_gradient=overwrite, backend=backend)
        torch.autograd.grad(loss, logits)
    held = peak = 0
    results: Any = profile.profiler
    for event in results.kineto_results.events():
        held += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, held)
    assert gradients * logits.nbytes <= peak < (gradients + 0.3) * logits.nbytes


def test_compiled_code_overwrites_nothing_and_agrees():
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    leaf, labels = make(dtype=torch.float32)
    loss = partial(nitp_ops.cross_entropy, labels=labels, inplace_gradient=True)
    compiled = torch.compile(lambda x: loss(x.sin()), fullgraph=True)
    for a, b in zip(
        outputs(compiled, [leaf], 0.37), outputs(lambda x: loss(x.sin()), [leaf], 0.37), strict=True
    ):
        close(a, b, 1e-6)
    logits = leaf.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(logits), logits)
    assert torch.equal(logits, leaf) and gradient.data_ptr() != logits.data_ptr()
