"""The cosine regulariser against the sum over pairs that defines it."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from nitp_ops.objectives import SpecError, build
from tests.support.objectives_cases import INFO, assert_same, make_batch

NAME = "cosine_regularizer"


def of_pairs(batch) -> tuple[torch.Tensor, int]:
    """(sum, count) of cos(h_i, h_j) over ordered pairs i != j of one document of one row."""
    rows, length = batch.ids.shape
    documents = torch.zeros_like(batch.ids) if batch.documents is None else batch.documents
    found = [
        F.cosine_similarity(batch.hidden[b, i], batch.hidden[b, j], dim=0, eps=1e-6)
        for b in range(rows)
        for i, j in itertools.permutations(range(length), 2)
        if documents[b, i] == documents[b, j] >= 0
    ]
    return torch.stack(found).sum() if found else batch.hidden.sum() * 0, len(found)


@pytest.mark.parametrize(
    "documents",
    [
        None,
        [[0, 0, 0, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 5], [0, 0, 0, -1, -1, -1, -1]],
        [[0, 1, 0, 1, 0, 2, -1], [3, 3, 9, 9, 9, 3, 3], [-1, -1, -2, -2, -1, -1, -1]],
    ],
    ids=["one", "packed", "interleaved"],
)
def test_it_is_the_mean_over_ordered_pairs_inside_a_document(documents):
    batch, objective = make_batch(), build(NAME, model=INFO)
    batch.documents = None if documents is None else torch.tensor(documents)
    total, count = of_pairs(batch)
    assert objective.count(batch.streams())[NAME].item() == count > 0
    out = objective(batch.streams())
    assert_same(out.loss, total / count, batch.leaves)
    assert out.metrics.compute()[f"{NAME}/loss"] == pytest.approx((total / count).item(), rel=1e-12)


def test_documents_of_one_token_have_no_pair_and_no_gradient():
    batch, objective = make_batch(), build(NAME, model=INFO)
    batch.documents = torch.arange(7).expand(3, 7)
    out = objective(batch.streams())
    (grad,) = torch.autograd.grad(out.loss, batch.hidden)
    assert objective.count(batch.streams())[NAME].item() == 0
    assert out.loss.item() == 0 and not grad.any()


def test_a_state_of_zero_stays_finite():
    batch = make_batch()
    with torch.no_grad():
        batch.hidden[0, 2] = 0
    out = build(NAME, model=INFO)(batch.streams())
    (grad,) = torch.autograd.grad(out.loss, batch.hidden)
    assert out.loss.isfinite() and grad.isfinite().all()


def test_bfloat16_states_are_compared_in_float32():
    batch = make_batch()
    exact = build(NAME, model=INFO)(
        batch.streams(last_hidden=batch.hidden.bfloat16().double())
    ).loss
    narrow = build(NAME, model=INFO)(batch.streams(last_hidden=batch.hidden.bfloat16())).loss
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), exact, rtol=1e-5, atol=1e-6)


def test_eps_must_be_positive():
    with pytest.raises(SpecError, match=r"cosine_regularizer: eps is 0"):
        build(f"{NAME}(eps=0)", model=INFO)
