"""implicit_token_loss: every law of the latent-side op."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nitp_ops
from nitp_ops import reference
from tests.support.budget import close, formula_error, near, outputs, widened

DISTANCES = ["cosine", "mse", "smooth_l1", "kl"]


@st.composite
def problems(draw):
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    batch, length = draw(st.integers(0, 3)), draw(st.integers(0, 9))
    width, inner = draw(st.integers(1, 16)), draw(st.sampled_from([5, 32]))
    projector = draw(st.sampled_from(["swiglu", "linear", "none"]))
    out = width if projector == "none" else draw(st.integers(3, 16))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = [normal(batch, length, width).requires_grad_(), normal(batch, length, out)]
    if projector == "swiglu":
        fused = normal(2 * inner, width)
        inputs += [fused[:inner].requires_grad_(), fused[inner:].requires_grad_()]
        inputs += [normal(out, inner).requires_grad_()]
    elif projector == "linear":
        inputs += [normal(out, width).requires_grad_()]
    valid = torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    options = {
        "valid": draw(st.sampled_from([None, valid])),
        "shift": draw(st.integers(0, 3)),
        "distance": draw(st.sampled_from(DISTANCES)),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    work = torch.float64 if dtype == torch.float64 else torch.float32
    upstream = (
        torch.rand(batch, length, generator=generator, dtype=work)
        if options["reduction"] == "none"
        else 0.37
    )
    return inputs, options, upstream, draw(st.sampled_from([1, 3000, None]))


def call(function, options):
    def of_tensors(hidden, target, *weights):
        gate, up, down = (
            weights
            if len(weights) == 3
            else (None, None, *weights)
            if weights
            else (None, None, None)
        )
        return function(hidden, target, gate, up, down, **options)

    return of_tensors


def near_the_reference(ours, inputs, options, upstream):
    formula = call(reference.implicit_token_loss, options)
    exact, room = (
        outputs(formula, widened(inputs), upstream),
        formula_error(formula, inputs, upstream),
    )
    near(ours, exact, ["loss", "d hidden", "d gate", "d up", "d down"], room)


@given(problems())
def test_it_equals_the_reference(problem):
    inputs, options, upstream, chunk = problem
    ours = outputs(
        call(nitp_ops.implicit_token_loss, {**options, "chunk_bytes": chunk}), inputs, upstream
    )
    near_the_reference(ours, inputs, options, upstream)
    assert [x.dtype for x in ours[1:]] == [x.dtype for x in inputs if x.requires_grad]


def test_one_feature_has_a_cosine_of_one_and_no_gradient_but_rounding():
    hidden, target = torch.tensor([[[1.541]]], requires_grad=True), torch.tensor([[[-0.2934]]])
    loss = nitp_ops.implicit_token_loss(hidden, target, shift=0)
    assert loss.item() == 2
    assert torch.autograd.grad(loss, hidden)[0].abs().item() < 1e-6


def make(batch=2, length=6, width=5, inner=8, out=4, dtype=torch.float64):
    hidden = torch.randn(batch, length, width, dtype=dtype, requires_grad=True)
    target = torch.randn(batch, length, out, dtype=dtype)
    weights = [torch.randn(inner, width, dtype=dtype, requires_grad=True) for _ in range(2)]
    return [hidden, target, *weights, torch.randn(out, inner, dtype=dtype, requires_grad=True)]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_holds_in_float64(distance, reduction):
    hidden, target, *weights = make()
    valid = torch.rand(2, 6) < 0.7

    def loss(hidden, *weights):
        options = {"valid": valid, "distance": distance, "reduction": reduction, "chunk_bytes": 700}
        return nitp_ops.implicit_token_loss(hidden, target, *weights, **options)

    assert torch.autograd.gradcheck(loss, (hidden, *weights))


def test_it_is_the_papers_formula():
    hidden, target, gate, up, down = make()
    projected = (torch.nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)) @ down.T
    cosine = torch.nn.functional.cosine_similarity(projected[:, :-1], target[:, 1:], dim=-1)
    close(nitp_ops.implicit_token_loss(hidden, target, gate, up, down), (1 - cosine).mean())


@pytest.mark.parametrize("shift", [0, 1, 2, 6, 7])
def test_a_shift_equals_slicing_and_never_wraps_around(shift):
    inputs = make()
    ours = outputs(call(nitp_ops.implicit_token_loss, {"shift": shift, "reduction": "sum"}), inputs)
    kept = max(0, 6 - shift)

    def sliced(hidden, target, *weights):
        options = {"shift": 0, "reduction": "sum"}
        return nitp_ops.implicit_token_loss(
            hidden[:, :kept], target[:, 6 - kept :], *weights, **options
        )

    for a, b in zip(ours, outputs(sliced, inputs), strict=True):
        close(a, b)


def test_packed_documents_equal_separate_rows():
    hidden, target, *weights = make(batch=1, length=7)
    # documents of 3 and 4 tokens
    valid = torch.tensor([[True, True, False, True, True, True, False]])
    packed = outputs(
        call(nitp_ops.implicit_token_loss, {"valid": valid, "reduction": "sum"}),
        [hidden, target, *weights],
    )

    def separate(hidden, target, *weights):
        parts = slice(0, 3), slice(3, 7)
        pairs = [(hidden[:, part], target[:, part]) for part in parts]
        return sum(nitp_ops.implicit_token_loss(h, z, *weights, reduction="sum") for h, z in pairs)

    for a, b in zip(packed, outputs(separate, [hidden, target, *weights]), strict=True):
        close(a, b)


def test_the_target_gets_no_gradient():
    hidden, target, *weights = make()
    target.requires_grad_()
    loss = nitp_ops.implicit_token_loss(hidden, target, *weights)
    assert torch.autograd.grad(loss, target, allow_unused=True)[0] is None


def test_adjacent_and_separate_gate_and_up_give_the_same_numbers():
    inputs = make()
    hidden, target, gate, up, down = inputs
    fused = torch.cat([gate, up]).detach()
    adjacent = [hidden, target, fused[:8].requires_grad_(), fused[8:].requires_grad_(), down]
    for a, b in zip(
        outputs(nitp_ops.implicit_token_loss, inputs),
        outputs(nitp_ops.implicit_token_loss, adjacent),
        strict=True,
    ):
        close(a, b)


@pytest.mark.parametrize("row_bytes", [1, 999, 5000])
def test_chunking_changes_nothing(row_bytes):
    inputs = make(batch=3, length=9)
    whole = outputs(call(nitp_ops.implicit_token_loss, {}), inputs)
    for a, b in zip(
        outputs(call(nitp_ops.implicit_token_loss, {"chunk_bytes": row_bytes}), inputs),
        whole,
        strict=True,
    ):
        close(a, b)


def test_strided_inputs_give_the_same_numbers():
    hidden, target, *weights = make()
    expected = outputs(nitp_ops.implicit_token_loss, [hidden, target, *weights])

    def crossed(x):  # [T, B, d] in memory: no view flattens the leading axes
        return x.detach().transpose(0, 1).contiguous().transpose(0, 1)

    def last_axis_strided(x):
        return x.detach().transpose(1, 2).contiguous().transpose(1, 2)

    for layout in (crossed, last_axis_strided):
        got = outputs(
            call(nitp_ops.implicit_token_loss, {"chunk_bytes": 800}),
            [layout(hidden).requires_grad_(), layout(target), *weights],
        )
        for a, b in zip(got, expected, strict=True):
            close(a, b)


def test_a_bfloat16_hidden_state_meets_a_float32_target():
    hidden, target, *weights = make(dtype=torch.bfloat16)
    target = torch.randn(2, 6, 4)
    inputs = [hidden, target, *weights]
    near(
        outputs(nitp_ops.implicit_token_loss, inputs),
        outputs(reference.implicit_token_loss, widened(inputs)),
    )


def test_bfloat16_near_cosine_one_stays_exact_where_the_naive_formula_fails():
    prediction = torch.randn(64, 512)
    target = (prediction + 0.142 * torch.randn(64, 512)).bfloat16()  # cosine about 0.99
    prediction = prediction.bfloat16()
    exact = reference.alignment(prediction.double(), target.double())
    ours = nitp_ops.alignment(prediction, target)
    # in bfloat16 throughout
    naive = 1 - torch.nn.functional.cosine_similarity(prediction, target, dim=-1)
    assert 0.005 < exact.mean() < 0.02
    assert ((ours - exact) / exact).abs().max() < 1e-4
    assert ((naive.double() - exact) / exact).abs().max() > 0.05


@given(problems(), st.sampled_from([None, "reference"]))
def test_gate_and_up_as_one_matrix_are_the_same_to_the_bit(problem, backend):
    (hidden, target, *weights), options, upstream, chunk = problem
    if len(weights) != 3:
        return
    fused = torch.cat(weights[:2]).detach().requires_grad_()

    def as_one(hidden, fused, down):
        given = {"gate_up": fused, "down": down, "chunk_bytes": chunk, "backend": backend}
        return nitp_ops.implicit_token_loss(hidden, target, **given, **options)

    apart = call(
        nitp_ops.implicit_token_loss, {**options, "chunk_bytes": chunk, "backend": backend}
    )
    loss, d_hidden, d_fused, d_down = outputs(as_one, [hidden, fused, weights[2]], upstream)
    expected = outputs(apart, [hidden, target, *weights], upstream)
    for a, b in zip((loss, d_hidden, *d_fused.chunk(2), d_down), expected, strict=True):
        assert torch.equal(a, b)
