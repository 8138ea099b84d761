"""The layout of tokens changes nothing: documents packed or apart, batches whole or split, pairs by
index or slice."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import nitp_ops
from nitp_ops import reference
from nitp_ops.objectives import NITP, CompositeObjective, Streams, build
from tests.support.budget import EPS, close, outputs
from tests.support.nitp_cases import KINDS, matrices, normal, on
from tests.support.objectives_cases import INFO, Batch, gradients, make_batch

SHIFTS = [0, 1, 2, 5]
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
LENGTHS = [6, 1, 8, 2]  # of the documents; one is shorter than every shift, one than most
PADDING = 3


def packed_batch() -> Batch:
    """One row of four documents and padding."""
    batch = make_batch(batch=1, length=sum(LENGTHS) + PADDING)
    ids = [torch.full((n,), place) for place, n in enumerate(LENGTHS)]
    batch.documents = torch.cat([*ids, torch.full((PADDING,), -1)])[None]
    return batch


def edges() -> list[tuple[int, int]]:
    return list(itertools.pairwise(itertools.accumulate(LENGTHS, initial=0)))


def separate_streams(batch: Batch) -> Streams:
    """The same documents as rows of their own, connected to the same leaves; NaN where a row has
    ended."""
    longest = max(LENGTHS)

    def rows(x: Tensor) -> Tensor:
        parts = [x[0, a:b] for a, b in edges()]
        return torch.stack(
            [F.pad(part, (0, 0, 0, longest - part.shape[0]), value=torch.nan) for part in parts]
        )

    alive = torch.arange(longest) < torch.tensor(LENGTHS)[:, None]
    return Streams(
        token_ids=torch.zeros_like(alive, dtype=torch.int64),
        attention_mask=alive,
        last_hidden=rows(batch.hidden),
        hidden_states={k: rows(state) for k, state in batch.states.items()},
    )


def assert_same_training(
    objective: CompositeObjective,
    batch: Batch,
    ours: Tensor,
    theirs: Tensor,
    tolerance: float = 1e-12,
) -> None:
    close(ours, theirs, tolerance)
    tensors = [*batch.leaves, *objective.parameters()]
    for a, b in zip(gradients(ours, tensors), gradients(theirs, tensors), strict=True):
        close(a, b, tolerance)


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("shift", SHIFTS)
def test_packed_documents_equal_separate_rows(shift, stop_gradient):
    """``V_k[t] = doc[t+k] == doc[t] >= 0``: loss, every gradient, count, constant predictor, skill and norms are
    those of the rows, ``count = sum over documents of max(0, n - k)``."""
    batch, objective = (
        packed_batch(),
        build([NITP(shift=shift, stop_gradient=stop_gradient)], model=INFO),
    )
    packed, apart = objective(batch.streams()), objective(separate_streams(batch))
    assert_same_training(objective, batch, packed.loss, apart.loss)
    metrics = packed.metrics.compute()
    assert metrics == pytest.approx(apart.metrics.compute(), rel=1e-12)
    assert metrics["nitp/count"] == sum(max(0, n - shift) for n in LENGTHS)
    assert 0 < metrics["nitp/constant_predictor_loss"] < 1 and metrics["nitp/skill"] < 1


@pytest.mark.parametrize("shift", SHIFTS)
def test_documents_one_at_a_time_add_up_to_the_packed_row(shift):
    """``SUM / COUNT`` with counts added over the calls; a document without a pair takes part with
    count 0. A mean of the documents' own means is another number."""
    batch, objective = packed_batch(), build([NITP(shift=shift)], model=INFO)
    whole = objective(batch.streams())
    parts = [
        Streams(
            token_ids=batch.ids[:, a:b],
            last_hidden=batch.hidden[:, a:b],
            hidden_states={k: s[:, a:b] for k, s in batch.states.items()},
        )
        for a, b in edges()
    ]
    counts = objective.count(parts[0])
    for part in parts[1:]:
        counts = counts + objective.count(part)
    assert counts["nitp"].item() == objective.count(batch.streams())["nitp"].item()
    outs = [objective(part, counts=counts) for part in parts]
    assert_same_training(
        objective, batch, torch.stack([out.loss for out in outs]).sum(), whole.loss
    )
    metrics = outs[0].metrics + outs[1].metrics + outs[2].metrics + outs[3].metrics
    assert metrics.compute() == pytest.approx(whole.metrics.compute(), rel=1e-9)
    local = [objective(part).loss.item() for part in parts if objective.count(part)["nitp"]]
    assert len(local) == 1 or abs(sum(local) / len(local) - whole.loss.item()) > 1e-4


@given(
    st.sampled_from(KINDS),
    st.sampled_from(SHIFTS),
    st.sets(st.integers(1, 4), max_size=4),
    st.lists(st.integers(0, 9), min_size=5, max_size=5),
    st.sampled_from([int, float, torch.tensor, lambda n: torch.tensor(float(n))]),
    st.integers(0, 2**20),
)
def test_microbatches_of_unequal_counts_equal_the_whole(kind, shift, cuts, counted, form, seed):
    """``sum_i SUM_i / N = SUM / N`` with N the window's number of pairs as `normalizer`, a number
    or a 0-d tensor."""
    hidden, target = normal(seed, 5, 8, 5).requires_grad_(), normal(seed + 1, 5, 8, 5)
    weights = matrices(kind, seed + 2, out=5)
    valid = torch.arange(8) < torch.tensor(counted)[:, None]
    total = int(reference.pairs(hidden, valid, shift).sum())
    whole = outputs(
        on(nitp_ops.implicit_token_loss, valid=valid, shift=shift), [hidden, target, *weights]
    )

    def split(hidden: Tensor, target: Tensor, *weights: Tensor) -> Tensor:
        losses = []
        for a, b in itertools.pairwise([0, *sorted(cuts), 5]):
            call = on(
                nitp_ops.implicit_token_loss,
                valid=valid[a:b],
                shift=shift,
                normalizer=form(max(total, 1)),
            )
            losses.append(call(hidden[a:b], target[a:b], *weights))
        return torch.stack(losses).sum()

    for a, b in zip(outputs(split, [hidden, target, *weights]), whole, strict=True):
        close(a, b)


def test_the_mean_of_local_means_is_not_the_mean():
    """``(1/2)(SUM_1/N_1 + SUM_2/N_2)`` weighs pairs of the shorter microbatch more; ``N_i/N``
    restores the mean."""
    hidden, target = normal(1, 2, 8, 5), normal(2, 2, 8, 5)
    valid = torch.arange(8) < torch.tensor([[7], [1]])
    whole = nitp_ops.implicit_token_loss(hidden, target, valid=valid)
    local = [
        nitp_ops.implicit_token_loss(hidden[i : i + 1], target[i : i + 1], valid=valid[i : i + 1])
        for i in (0, 1)
    ]
    assert abs(sum(local) / 2 - whole) > 0.05
    close((7 * local[0] + local[1]) / 8, whole)


@given(
    DTYPES,
    st.sampled_from(["cosine", "mse", "smooth_l1", "kl"]),
    st.sampled_from(SHIFTS),
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from([1, 200, None]),
    st.integers(0, 2**20),
)
def test_a_shift_by_index_gives_the_bits_of_a_slice(
    dtype, distance, shift, batch, length, chunk, seed
):
    """``loss[t] = distance(p_t, z_{t+k})``: the row kernel reads row t + k where it lies, and a
    slice puts the same row first; without a projector no GEMM stands between them, so
    every bit agrees."""
    hidden = normal(seed, batch, length, 5).to(dtype).requires_grad_()
    target = normal(seed + 1, batch, length, 5).to(dtype)
    kept = max(0, length - shift)
    upstream = normal(seed + 2, batch, length).to(reference.working(hidden))
    options = {"distance": distance, "reduction": "none", "chunk_bytes": chunk}
    loss, d_hidden = outputs(
        on(nitp_ops.implicit_token_loss, shift=shift, **options), [hidden, target], upstream
    )

    def sliced(hidden: Tensor, target: Tensor) -> Tensor:
        call = on(nitp_ops.implicit_token_loss, shift=0, **options)
        return F.pad(call(hidden[:, :kept], target[:, length - kept :]), (0, length - kept))

    expected = outputs(sliced, [hidden, target], upstream)
    assert torch.equal(loss, expected[0]) and torch.equal(d_hidden, expected[1])
    assert not loss[:, kept:].any() and not d_hidden[:, kept:].any()


@given(DTYPES, st.sampled_from(SHIFTS), st.integers(1, 3), st.integers(0, 2**20))
def test_a_shift_through_the_projector_equals_a_slice_within_one_rounding(
    dtype, shift, batch, seed
):
    """``L = (1/n) sum_t distance(P(h_t), z_{t+k})``: the same rows through the same GEMMs; the
    sum of row losses may meet its zeros in another order."""
    hidden = normal(seed, batch, 9, 16).to(dtype).requires_grad_()
    target = normal(seed + 1, batch, 9, 16).to(dtype)
    weights = [
        w.detach().to(dtype).requires_grad_() for w in matrices("swiglu", seed + 2, 16, 16, 32)
    ]
    kept = 9 - shift

    def sliced(hidden: Tensor, target: Tensor, *weights: Tensor) -> Tensor:
        call = on(nitp_ops.implicit_token_loss, shift=0)
        return call(hidden[:, :kept].contiguous(), target[:, shift:].contiguous(), *weights)

    by_index = outputs(on(nitp_ops.implicit_token_loss, shift=shift), [hidden, target, *weights])
    for a, b in zip(by_index, outputs(sliced, [hidden, target, *weights]), strict=True):
        close(a, b, 4 * EPS[dtype])
