"""swiglu and alignment: the memory-bound ops, and the mathematics of the cosine loss."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import nitp_ops
from nitp_ops import reference
from tests.support.budget import close, formula_error, near, outputs, widened

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
DISTANCES = ["cosine", "mse", "smooth_l1", "kl"]


def normal(seed, *shape, scale=1.0):
    return scale * torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


@given(
    st.sampled_from(DTYPES),
    st.integers(0, 5),
    st.integers(1, 70),
    st.integers(0, 2**20),
    st.sampled_from([1.0, 40.0]),
)
def test_swiglu_equals_the_reference(dtype, rows, width, seed, scale):
    inputs = [
        normal(seed + i, 2, rows, width, scale=scale).to(dtype).requires_grad_() for i in range(2)
    ]
    upstream = normal(seed + 2, 2, rows, width).to(dtype)
    ours = outputs(nitp_ops.swiglu, inputs, upstream)
    exact = outputs(reference.swiglu, widened(inputs), upstream.double())
    near(ours, exact)


@given(
    st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from(DISTANCES),
    st.integers(0, 5), st.integers(1, 70), st.integers(0, 2**20),
)  # fmt: skip
# a width of 1: 1.2e-5 off where the gradient is zero
@example(torch.float32, torch.float32, "cosine", 3, 1, 116610)
def test_alignment_equals_the_reference(p_dtype, z_dtype, distance, rows, width, seed):
    inputs = [normal(seed, 2, rows, width).to(p_dtype).requires_grad_()]
    inputs.append(normal(seed + 1, 2, rows, width).to(z_dtype).requires_grad_())
    upstream = normal(seed + 2, 2, rows).to(reference.working(*inputs))
    ours = outputs(lambda p, z: nitp_ops.alignment(p, z, distance=distance), inputs, upstream)

    def formula(p, z):
        return reference.alignment(p, z, distance=distance)

    exact, room = (
        outputs(formula, widened(inputs), upstream.double()),
        formula_error(formula, inputs, upstream),
    )
    near(ours, exact, room=room)
    assert [x.dtype for x in ours] == [reference.working(*inputs), p_dtype, z_dtype]


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradcheck_holds_for_both_sides(distance):
    inputs = [normal(seed, 3, 5).requires_grad_() for seed in (1, 2)]
    assert torch.autograd.gradcheck(
        lambda p, z: nitp_ops.alignment(p, z, distance=distance), inputs
    )
    assert torch.autograd.gradcheck(nitp_ops.swiglu, inputs)


def test_the_cosine_gradient_is_the_closed_form():
    p, z = normal(1, 4, 9).requires_grad_(), normal(2, 4, 9)
    gradient = torch.autograd.grad(nitp_ops.alignment(p, z).sum(), p)[0]
    norm = p.norm(dim=-1, keepdim=True)
    p_unit, z_unit = p / norm, z / z.norm(dim=-1, keepdim=True)
    cosine = (p_unit * z_unit).sum(-1, keepdim=True)
    close(gradient, -(z_unit - cosine * p_unit) / norm)
    assert (gradient * p).sum(-1).abs().max() < 1e-14  # orthogonal to p
    longer = torch.autograd.grad(nitp_ops.alignment(p, 7 * z).sum(), p)[0]
    close(longer, gradient)  # blind to the target's length
    scaled = (3 * p).detach().requires_grad_()
    # 1 / |p|
    close(3 * torch.autograd.grad(nitp_ops.alignment(scaled, z).sum(), scaled)[0], gradient)


def test_mse_of_unit_vectors_is_twice_the_cosine_loss_over_the_width():
    p, z = (torch.nn.functional.normalize(normal(seed, 4, 9), dim=-1) for seed in (1, 2))
    close(nitp_ops.alignment(p, z, distance="mse"), 2 * nitp_ops.alignment(p, z) / 9)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_zero_row_costs_one_and_gets_no_gradient(backend):
    p, z = torch.zeros(1, 4, requires_grad=True), torch.ones(1, 4, requires_grad=True)
    for first, second in ((p, z), (z, p)):
        loss = nitp_ops.alignment(first, second, backend=backend)
        d_p = torch.autograd.grad(loss.sum(), p)[0]
        assert loss.item() == 1 and (d_p == 0).all()


def test_rows_under_eps_are_clamped():
    p, z = torch.full((1, 4), 1e-8), torch.ones(1, 4)
    close(nitp_ops.alignment(p, z), 1 - torch.tensor([2e-8 / 1e-6]))


def test_strided_rows_are_read_in_place():
    both = normal(3, 6, 20)
    gate, up = both[:, :10], both[:, 10:]
    assert torch.equal(
        nitp_ops.swiglu(gate, up), nitp_ops.swiglu(gate.contiguous(), up.contiguous())
    )
    assert torch.equal(
        nitp_ops.alignment(gate.T, up.T), nitp_ops.alignment(gate.T.contiguous(), up.T.contiguous())
    )
    assert nitp_ops.swiglu(gate.T, up.T).is_contiguous()


def test_results_are_bitwise_the_same_at_any_thread_count():
    gate, up = normal(1, 999, 130).float(), normal(2, 999, 130).float()
    torch.set_num_threads(1)
    one = nitp_ops.swiglu(gate, up), nitp_ops.alignment(gate, up)
    torch.set_num_threads(2)
    two = nitp_ops.swiglu(gate, up), nitp_ops.alignment(gate, up)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
