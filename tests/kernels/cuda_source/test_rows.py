"""The CUDA kernels of alignment, SwiGLU and accumulation, compiled by g++ and run thread by thread,
equal the CPU's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nitp_ops.kernels import select
from tests.kernels.cuda_source.build_for_cpu import choose, placed, simt, untouched
from tests.support.budget import near

pytestmark = pytest.mark.gpu_source

if select.load_error is not None:
    pytest.skip(
        f"no compiled kernels to compare with: {select.load_error}", allow_module_level=True
    )

NAN = float("nan")
NARROW = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = [(p, z) for p in NARROW for z in NARROW] + [(torch.float64, torch.float64)]
DISTANCES = {"cosine": 0, "mse": 1, "smooth_l1": 2, "kl": 3}
ORDERS = st.sampled_from(["forward", "backward", "shuffled"])
COLUMNS = st.sampled_from([1, 2, 31, 33, 255, 1000, 5000])


@pytest.fixture(scope="module", autouse=True)
def kernels():
    return simt()


@st.composite
def place(draw):
    """Where rows stand: elements after an aligned address, and between two rows."""
    return draw(st.integers(0, 9)), draw(st.sampled_from([0, 1, 8]))


def put(values, where):
    offset, gap = where
    return placed(values, offset, values.shape[1] + gap)


def alignment(
    p, z, distance, *, kernels, dp=None, dz=None, target_rows=None, row_scale=None, gradient=True
):
    """[gradient of p, gradient of z or None, stats]; dp=None: in place."""
    work = torch.float64 if torch.float64 in (p.dtype, z.dtype) else torch.float32
    stats = torch.full((4, len(p)), NAN, dtype=work)
    scale = None if row_scale is None else row_scale.to(work)
    kernels.alignment_rows_(
        p, z, target_rows, scale, stats, dp, dz, DISTANCES[distance], 1e-6, gradient
    )
    return [p if dp is None else dp, dz, stats]


def ours_and_exact(p, z, distance, *, both=False, **options):
    """Of the CUDA kernel, and of the CPU kernel in float64."""
    wide = [p.double().clone(), z.double().clone()]

    def apart(*dtypes):
        return [torch.full(p.shape, NAN, dtype=dtype) if both else None for dtype in dtypes]

    dp, dz = apart(torch.float64, torch.float64)
    exact = alignment(
        wide[0], wide[1], distance, kernels=torch.ops.nitp_ops, dp=dp, dz=dz, **options
    )
    dp, dz = apart(p.dtype, z.dtype)
    return alignment(p, z, distance, kernels=torch.ops.nitp_simt, dp=dp, dz=dz, **options), exact


def same(ours, exact):
    for name, a, b in zip(("d_prediction", "d_target", "stats"), ours, exact, strict=True):
        if a is not None:
            assert torch.equal(a.isnan(), b.isnan()), name
            near([a.nan_to_num(0, 0, 0)], [b.nan_to_num(0, 0, 0)], [name])


@given(st.data())
def test_alignment_with_every_option_dtype_stride_and_address(data):
    choose(data.draw(ORDERS))
    columns, (p_dtype, z_dtype) = data.draw(COLUMNS), data.draw(st.sampled_from(PAIRS))
    distance, both = data.draw(st.sampled_from(list(DISTANCES))), data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    rows_, by_index = data.draw(st.integers(1, 3)), not both and data.draw(st.booleans())
    p, z = (
        torch.randn(rows_, columns).to(p_dtype),
        torch.randn(5 if by_index else rows_, columns).to(z_dtype),
    )
    if data.draw(st.booleans()):
        # near a cosine of one
        z[:rows_] = (p.double() + 0.01 * torch.randn(rows_, columns)).to(z_dtype)
    options = {
        "target_rows": torch.randint(0, 5, (rows_,)) if by_index else None,
        "row_scale": data.draw(st.sampled_from([None, torch.tensor([0.7, 0.0, -2.0])[:rows_]])),
        "gradient": data.draw(st.sampled_from([True, True, False])),
    }
    p, z = put(p, data.draw(place())), put(z, data.draw(place()))
    kept = z.clone()
    same(*ours_and_exact(p, z, distance, both=both, **options))
    assert untouched(p) and torch.equal(z, kept)


@pytest.mark.parametrize("columns", [33, 5000])
def test_a_row_whose_squares_overflow_has_the_cosine_of_any_other(columns):
    choose("shuffled")
    p, z = torch.randn(3, columns), torch.randn(3, columns)
    z[0] += 4 * p[0]
    for by_p, by_z in ((2.0**100, 1.0), (1.0, 2.0**100), (2.0**70, 2.0**90)):
        into = torch.ones(3, columns), torch.ones(3, columns)
        dp, dz, stats = alignment(
            by_p * p, by_z * z, "cosine", kernels=torch.ops.nitp_simt, dp=into[0], dz=into[1]
        )
        stats = torch.stack([*stats[:2], stats[2] / by_p, stats[3] / by_z])
        expected = alignment(
            p, z, "cosine", kernels=torch.ops.nitp_ops, dp=into[0].clone(), dz=into[1].clone()
        )
        same([by_p * dp, by_z * dz, stats], expected)


def test_kl_of_logits_as_far_apart_as_float32_goes():
    p = torch.tensor([[3e38, -3e38, 1.0], [1.0, 2.0, 3.0]])
    z = torch.tensor([[2.0, -3e38, -3e38], [3e38, 0.0, -3e38]])
    ours, exact = ours_and_exact(p, z, "kl", both=True)
    assert all(each.isfinite().all() for each in (*ours[:2], ours[2][0]))
    same([*ours[:2], ours[2][0]], [*exact[:2], exact[2][0]])


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pair_longer_than_the_registers_is_read_again(distance, dtype):
    choose("backward")
    same(
        *ours_and_exact(
            torch.randn(1, 12345).to(dtype), torch.randn(1, 12345).to(dtype), distance, both=True
        )
    )


@pytest.mark.parametrize("distance", DISTANCES)
def test_nan_rows_spoil_themselves_and_zero_rows_are_defined(distance):
    choose()
    p, z = torch.randn(5, 100), torch.randn(5, 100)
    p[0, 3], z[1, 99], p[2], z[3] = NAN, NAN, 0, 0
    same(*ours_and_exact(p.clone(), z.clone(), distance, both=True))
    same(*ours_and_exact(p.clone(), z.clone(), distance, row_scale=torch.zeros(5)))


def test_the_loss_near_a_cosine_of_one_keeps_its_digits():
    choose()
    p = torch.randn(4, 4096)
    z = p + 0.01 * torch.randn(4, 4096)
    ours, exact = ours_and_exact(p, z, "cosine")
    # 1 - c in float32 is off by 3e-3
    assert ((ours[2][0] - exact[2][0]) / exact[2][0]).abs().max() < 2e-6


@pytest.mark.parametrize("row", [-1, 5, 2**40])
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_target_row_outside_poisons_its_pair_and_reads_nothing(row, weight):
    choose()
    where, scale = torch.tensor([4, row, 0]), torch.tensor([1.0, weight, 1.0])
    p, z = torch.randn(3, 33), torch.randn(5, 33)
    whole = alignment(
        p.clone(),
        z,
        "cosine",
        kernels=torch.ops.nitp_ops,
        target_rows=torch.tensor([4, 0, 0]),
        row_scale=scale,
    )
    ours = alignment(
        p, z, "cosine", kernels=torch.ops.nitp_simt, target_rows=where, row_scale=scale
    )
    assert ours[2][:, 1].isnan().all()
    assert ours[0][1].isnan().all() if weight else not ours[0][1].any()
    near([ours[0][::2], ours[2][:, ::2]], [whole[0][::2], whole[2][:, ::2]])


@given(
    COLUMNS,
    st.sampled_from([*NARROW, torch.float64]),
    st.lists(place(), min_size=3, max_size=3),
    ORDERS,
)
def test_swiglu_forward_and_backward_in_place(columns, dtype, places, order):
    choose(order)
    gate, up, upstream = (put((4 * torch.randn(3, columns)).to(dtype), where) for where in places)
    out, exact = (
        torch.full_like(gate.clone(), NAN),
        torch.full((3, columns), NAN, dtype=torch.float64),
    )
    wide = [x.double().clone() for x in (gate, up, upstream)]
    torch.ops.nitp_simt.swiglu_rows(gate, up, out)
    torch.ops.nitp_ops.swiglu_rows(*wide[:2], exact)
    near([out], [exact])
    torch.ops.nitp_simt.swiglu_rows_backward_(gate, up, upstream)
    torch.ops.nitp_ops.swiglu_rows_backward_(*wide)
    near([gate, up], wide[:2])
    assert untouched(gate) and untouched(up) and torch.equal(upstream.double(), wide[2])


@given(
    COLUMNS,
    st.sampled_from([*NARROW, torch.float64]),
    st.sampled_from([None, 0.5, 0.0]),
    place(),
    place(),
)
def test_accumulation_is_exact_and_a_factor_of_zero_adds_nothing(
    columns, dtype, factor, of_sum, of_addend
):
    choose()
    work = torch.float64 if dtype == torch.float64 else torch.float32
    total = put(torch.randn(3, columns, dtype=work), of_sum)
    addend = put(torch.randn(3, columns).to(dtype), of_addend)
    by = None if factor is None else torch.tensor(factor, dtype=work)
    expected = total + (1 if factor is None else factor) * addend.to(work)
    if factor == 0:
        addend[1, -1], expected = NAN, total.clone()
    dense = total.clone()
    torch.ops.nitp_simt.accumulate_rows_(total, addend, by)
    assert torch.equal(total, expected) and untouched(total)
    if dtype != torch.float16:  # which no GEMM on CPU has
        torch.ops.nitp_ops.accumulate_rows_(dense, addend, by)
        assert torch.equal(dense, expected)


@given(
    COLUMNS, st.sampled_from([*NARROW, torch.float64]), st.sampled_from([0.37, 1.0, 0.0]), place()
)
def test_scaling_is_one_rounding_and_keeps_a_nan_out_under_zero(columns, dtype, factor, of_rows):
    choose()
    values = torch.randn(3, columns).to(dtype)
    values[1, -1] = NAN
    work = torch.float64 if dtype == torch.float64 else torch.float32
    by, placed_rows, dense = torch.tensor(factor, dtype=work), put(values, of_rows), values.clone()
    expected = (values.to(work) * by).to(dtype) if factor else torch.zeros_like(values)
    torch.ops.nitp_simt.scale_rows_(placed_rows, by)
    torch.ops.nitp_ops.scale_rows_(dense, by)
    torch.testing.assert_close(placed_rows, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(dense, expected, rtol=0, atol=0, equal_nan=True)
    assert untouched(placed_rows)


OUT_OF_PLACE = [
    *[(dtype, dtype) for dtype in (*NARROW, torch.float64)],
    (torch.float32, torch.float16),
]


@given(COLUMNS, st.sampled_from(OUT_OF_PLACE), st.sampled_from([0.37, 1.0, 0.0]), place(), place())
def test_scaling_into_another_tensor_is_one_pass_that_leaves_the_rows(
    columns, dtypes, factor, of_rows, of_out
):
    choose()
    dtype, narrow = dtypes
    values = torch.randn(3, columns).to(dtype)
    values[1, -1] = NAN
    work = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (
        (values.to(work) * factor).to(narrow) if factor else torch.zeros_like(values, dtype=narrow)
    )
    for kernels in (torch.ops.nitp_simt, torch.ops.nitp_ops):
        placed_rows, out = (
            put(values, of_rows),
            put(torch.full_like(values, 5, dtype=narrow), of_out),
        )
        kernels.scale_rows_(placed_rows, torch.tensor(factor, dtype=work), out)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(placed_rows, values, rtol=0, atol=0, equal_nan=True)
        assert untouched(out) and untouched(placed_rows)


def test_empty_rows_and_what_does_not_fit_together():
    choose()
    empty = torch.randn(0, 8)
    torch.ops.nitp_simt.swiglu_rows(empty, empty, empty)
    torch.ops.nitp_simt.swiglu_rows(torch.randn(3, 0), torch.randn(3, 0), torch.randn(3, 0))
    same(*ours_and_exact(empty, empty, "cosine"))
    with pytest.raises(RuntimeError, match="float64 meets only float64"):
        alignment(
            torch.randn(2, 8).double(), torch.randn(2, 8), "cosine", kernels=torch.ops.nitp_simt
        )
    with pytest.raises(RuntimeError, match=r"sum must be float32 \(float64 for float64\)"):
        torch.ops.nitp_simt.accumulate_rows_(torch.randn(2, 8), torch.randn(2, 8).double())
    with pytest.raises(RuntimeError, match="out must have the dtype of rows"):
        torch.ops.nitp_simt.scale_rows_(
            torch.randn(2, 8), torch.tensor(0.5), torch.randn(2, 8).bfloat16()
        )
