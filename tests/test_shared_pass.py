"""shared_linear_cross_entropy: several jobs, one matrix, one pass."""

import pytest
import torch
from budget import close, outputs
from hypothesis import given
from hypothesis import strategies as st

import nitp_ops
from nitp_ops import reference


def make(rows=12, width=6, vocabulary=31, dtype=torch.float64):
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, vocabulary, (rows,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_job_of_weight_zero_leaves_the_other_gradients_bit_identical(dtype):
    hidden, weight, labels = make(rows=130, width=48, vocabulary=700, dtype=dtype)
    other = torch.full((7, 48), float("nan"), dtype=dtype)
    main = nitp_ops.HeadJob(hidden, labels, torch.tensor(1 / 130))
    silent = nitp_ops.HeadJob(other, labels[:7], torch.tensor(0.0))
    alone = outputs(lambda h, w: nitp_ops.shared_linear_cross_entropy([main], w)[0], [hidden, weight])
    beside = outputs(lambda h, w: nitp_ops.shared_linear_cross_entropy([main, silent], w)[0], [hidden, weight])
    for a, b in zip(alone, beside, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_longer_job_of_weight_zero_does_not_move_the_chunks_of_the_others(dtype):
    hidden, weight, labels = make(rows=60, width=64, vocabulary=1000, dtype=dtype)
    main = nitp_ops.HeadJob(hidden[:50], labels[:50], torch.tensor(0.01))
    silent = nitp_ops.HeadJob(hidden, labels, torch.tensor(0.0))
    size = 30 * 1000 * dtype.itemsize
    alone = outputs(lambda h, w: nitp_ops.shared_linear_cross_entropy([main], w, chunk_bytes=size)[0], [hidden, weight])
    beside = outputs(
        lambda h, w: nitp_ops.shared_linear_cross_entropy([main, silent], w, chunk_bytes=size)[0], [hidden, weight]
    )
    for a, b in zip(alone, beside, strict=True):
        assert torch.equal(a, b)


@given(st.integers(1, 4), st.integers(0, 2**20))
def test_the_shared_pass_equals_the_sum_of_its_jobs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(19, 5, generator=generator, dtype=torch.float64).requires_grad_()
    jobs = []
    for place in range(count):
        hidden = torch.randn(2, 3 + place, 5, generator=generator, dtype=torch.float64).requires_grad_()
        labels = torch.randint(0, 19, (2, 3 + place), generator=generator)
        labels[0, 0] = -100
        jobs.append(nitp_ops.HeadJob(hidden, labels, torch.rand((), generator=generator).double(), 0.1 * place, 0.01))
    inputs = [weight, *(job.hidden for job in jobs)]
    together = outputs(lambda w, *_: nitp_ops.shared_linear_cross_entropy(jobs, w, chunk_bytes=19 * 8 * 2)[0], inputs)
    apart = outputs(lambda w, *_: reference.shared_linear_cross_entropy(jobs, w), inputs)
    for a, b in zip(together, apart, strict=True):
        close(a, b)
