"""Whole ops over the CUDA kernels, compiled by g++ and run thread by thread, as a GPU runs them: no
value is read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nitp_ops
import tests.ops.cross_entropy.test_linear_cross_entropy as token
import tests.ops.implicit_token.test_implicit_token_loss as latent
from nitp_ops import reference
from nitp_ops.kernels import select
from tests.core.without_reading import without_reading
from tests.kernels.cuda_source.build_for_cpu import choose, simt
from tests.support.budget import near, outputs, widened

pytestmark = pytest.mark.gpu_source

if select.load_error is not None:
    pytest.skip(
        f"no compiled kernels beside the CUDA ones: {select.load_error}", allow_module_level=True
    )

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@pytest.fixture(scope="module", autouse=True)
def kernels():
    return simt()


@settings(max_examples=20)
@given(token.problems())
def test_linear_cross_entropy_equals_the_reference(problem):
    choose("shuffled")
    inputs, labels, options, upstream, chunk = problem
    ours = token.call(nitp_ops.linear_cross_entropy, labels, {**options, "chunk_bytes": chunk})
    with without_reading(torch.ops.nitp_simt):
        ours = outputs(ours, inputs, upstream)
    exact = outputs(
        token.call(reference.linear_cross_entropy, labels, options), widened(inputs), upstream
    )
    near(ours, exact, ["loss", "d hidden", "d weight", "d bias"])


@settings(max_examples=20)
@given(latent.problems())
def test_implicit_token_loss_equals_the_reference(problem):
    choose("backward")
    inputs, options, upstream, chunk = problem
    ours = latent.call(nitp_ops.implicit_token_loss, {**options, "chunk_bytes": chunk})
    with without_reading(torch.ops.nitp_simt):
        ours = outputs(ours, inputs, upstream)
    latent.near_the_reference(ours, inputs, options, upstream)


@settings(max_examples=15)
@given(DTYPES, st.sampled_from(latent.DISTANCES), st.booleans())
def test_alignment_and_swiglu_equal_the_reference(dtype, distance, strided):
    choose()
    p, z = (torch.randn(3, 4, 34).to(dtype) for _ in range(2))
    inputs = [x[:, ::2, :17].requires_grad_() if strided else x.requires_grad_() for x in (p, z)]
    upstream = torch.rand(
        inputs[0].shape[:-1], dtype=torch.float64 if dtype == torch.float64 else torch.float32
    )
    with without_reading(torch.ops.nitp_simt):
        ours = outputs(lambda a, b: nitp_ops.alignment(a, b, distance=distance), inputs, upstream)
        gated = outputs(nitp_ops.swiglu, inputs, 0.5)
    near(
        ours,
        outputs(
            lambda a, b: reference.alignment(a, b, distance=distance), widened(inputs), upstream
        ),
    )
    near(gated, outputs(reference.swiglu, widened(inputs), 0.5))


def test_an_out_of_range_label_poisons_its_row_and_no_other():
    hidden, weight = torch.randn(4, 5, requires_grad=True), torch.randn(33, 5)
    labels = torch.tensor([1, 33, -100, 2**40])
    choose()
    with without_reading(torch.ops.nitp_simt):
        loss = nitp_ops.linear_cross_entropy(hidden, weight, labels, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), hidden)
    assert loss.isnan().tolist() == [False, True, False, True]
    assert gradient.isnan().all(1).tolist() == [False, True, False, True]
