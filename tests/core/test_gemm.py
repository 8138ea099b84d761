"""This library's own GEMMs on CPU: every shape, stride and dtype against float64, with a bound an
element."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nitp_ops.core import gemm, library
from tests.support.processor import parameters

pytestmark = pytest.mark.skipif(
    not gemm.has_native_gemm("cpu", torch.float32), reason="GEMMs are another library's here"
)
DTYPES = (torch.float32, torch.bfloat16)
SETS = ("avx2", "avx512", "avx512_bf16")
BEST = library.instruction_set()
#: Terms that are summed before they are added to the rest.
CHAIN = {torch.float32: 256, torch.bfloat16: 2048}
sides = st.one_of(st.integers(1, 70), st.sampled_from([111, 112, 113, 511, 530]))
depths = st.one_of(
    st.integers(1, 70), st.sampled_from([511, 512, 513, 1024, 1030, 2048, 2050, 4100])
)


@pytest.fixture(autouse=True, scope="module", params=parameters(SETS))
def instruction_set(request):
    library.choose_instruction_set(request.param)
    yield request.param
    library.choose_instruction_set(BEST)


def multiply(out, a, b, add=False):
    torch.ops.nitp_ops.gemm_(out, a, b, add)
    return out


def matrix(rows, columns, dtype, transposed=False, seed=0):
    """In the middle of a larger one."""
    generator = torch.Generator().manual_seed(seed)
    shape = (columns + 5, rows + 3) if transposed else (rows + 3, columns + 5)
    whole = torch.randn(shape, generator=generator).to(dtype)
    return (
        whole[2 : columns + 2, 1 : rows + 1].t()
        if transposed
        else whole[1 : rows + 1, 2 : columns + 2]
    )


def bound(a, b, out_dtype, of=0.0):
    """Of the error: one rounding a term of a chain, one a chain, one of the result."""
    chain = CHAIN[a.dtype]
    terms = min(a.shape[1], chain) + a.shape[1] // chain + 3
    magnitude = a.double().abs() @ b.double().abs() + abs(of)
    return (
        2.0**-24 * terms * magnitude
        + torch.finfo(out_dtype).eps / 2 * (a.double() @ b.double() + of).abs()
    )


@given(
    m=sides, n=sides, k=depths, which=st.integers(0, 2), layout=st.integers(0, 3), add=st.booleans()
)
def test_a_gemm_equals_float64_and_writes_nothing_beside_its_result(m, n, k, which, layout, add):
    dtype = DTYPES[min(which, 1)]
    out_dtype = torch.float32 if which < 2 else dtype
    a, b = matrix(m, k, dtype, layout % 2 == 1), matrix(k, n, dtype, layout > 1, seed=1)
    around = torch.full((m + 2, n + 4), 3.0, dtype=out_dtype)
    out = multiply(around[1 : m + 1, 2 : n + 2], a, b, add)
    exact = a.double() @ b.double() + 3.0 * add
    assert ((out.double() - exact).abs() <= bound(a, b, out_dtype, 3.0 * add)).all()
    around[1 : m + 1, 2 : n + 2] = 3.0
    assert (around == 3.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(9000, 40, 30), (40, 20000, 30), (1100, 600, 2100), (30, 30, 70000), (60, 9000, 600)],
)
def test_more_than_one_cell_or_part_a_thread(dtype, m, n, k):
    a, b = matrix(m, k, dtype), matrix(k, n, dtype, seed=1)
    out = multiply(torch.empty(m, n, dtype=dtype), a, b)
    assert ((out.double() - a.double() @ b.double()).abs() <= bound(a, b, dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [300, 2100])
def test_a_number_of_the_result_depends_on_its_row_and_column_alone(dtype, k):
    """Not on the threads, and not on which other rows are there."""
    a, b = matrix(130, k, dtype), matrix(k, 90, dtype, seed=1)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(multiply(torch.empty(130, 90, dtype=dtype), a, b))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each, found[0]) for each in found)
    assert torch.equal(
        multiply(torch.empty(29, 7, dtype=dtype), a[50:79], b[:, 13:20]), found[0][50:79, 13:20]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "words"), [(8200, 120), (60, 2100)], ids=["whole depth", "depth in parts"]
)
def test_rows_that_all_cells_share_give_the_same_numbers(dtype, m, words, instruction_set):
    """9000 columns are more cells wide than there are threads. A small GEMM shares none."""
    k = words * (2 if (dtype, instruction_set) == (torch.bfloat16, "avx512_bf16") else 1)
    a, b = matrix(m, k, dtype), matrix(k, 9000, dtype, seed=1)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(multiply(torch.empty(m, 9000, dtype=dtype), a, b))
    finally:
        torch.set_num_threads(threads)
    out = found[0]
    assert torch.equal(out, found[1])
    for rows in (slice(0, 20), slice(m // 2 - 10, m // 2 + 30), slice(m - 20, m)):
        for columns in (slice(0, 40), slice(2990, 3050), slice(5990, 6050), slice(8970, 9000)):
            apart = multiply(
                torch.empty_like(out[rows, columns].contiguous()), a[rows], b[:, columns]
            )
            assert torch.equal(out[rows, columns], apart)


@pytest.mark.parametrize(
    ("k", "most"), [(128, 1.1), (256, 1.5), (512, 1.3), (2048, 1.3), (8192, 1.3)]
)
def test_float32_sums_round_little_more_than_those_of_mkl(k, most):
    """One chain of 512 made it 1.7, chains of any length as long as the depth 2.2 (decision 0008)."""
    a, b = matrix(200, k, torch.float32), matrix(k, 200, torch.float32, seed=1)
    exact = a.double() @ b.double()
    ours, torchs = multiply(torch.empty(200, 200), a, b), torch.mm(a, b)
    assert (ours - exact).norm() <= most * (torchs - exact).norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row_and_column(dtype):
    a, b = matrix(33, 61, dtype).clone(), matrix(61, 45, dtype, seed=1).clone()
    a[7, 60], b[3, 44] = float("nan"), float("inf")
    out = multiply(torch.empty(33, 45, dtype=dtype), a, b)
    assert out[7].isnan().all() and not out[:, 44].isfinite().any()
    assert out[torch.arange(33) != 7][:, :44].isfinite().all()


def test_what_is_no_gemm_is_refused():
    a, b, out = torch.randn(3, 4), torch.randn(4, 5), torch.empty(3, 5)
    for bad, message in (
        ((out, a, b[:3]), "shapes do not match"),
        ((out[:2], a, b), "shapes do not match"),
        ((out, a, b.double()), "expected float32, or bfloat16 into"),
        ((out.half(), a.half(), b.half()), "expected float32, or bfloat16 into"),
        ((out.bfloat16(), a, b), "expected float32, or bfloat16 into"),
        ((torch.empty(3, 10)[:, ::2], a, b), "out with dense rows"),
        ((out, torch.randn(6, 8)[::2, ::2], b), "dense rows or columns"),
        ((torch.empty(3, 0), a, b[:, :0]), "not empty"),
    ):
        with pytest.raises(RuntimeError, match=message):
            multiply(*bad)


def test_the_portable_instruction_set_leaves_gemms_to_torch(instruction_set):
    a, b = torch.randn(40, 50), torch.randn(50, 60)
    try:
        library.choose_instruction_set("portable")
        assert not any(gemm.has_native_gemm("cpu", dtype) for dtype in DTYPES)
        with pytest.raises(RuntimeError, match="not for this processor"):
            multiply(torch.empty(40, 60), a, b)
        result = gemm.matmul(a.bfloat16(), b.bfloat16(), torch.empty(40, 60, dtype=torch.bfloat16))
        assert torch.equal(result, a.bfloat16() @ b.bfloat16())
    finally:
        library.choose_instruction_set(instruction_set)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_takes_any_stride_and_any_size(dtype):
    for m, k, n in ((0, 3, 4), (3, 0, 4), (1, 1, 1), (5, 1, 6), (1, 5, 6), (5, 6, 1), (40, 50, 60)):
        a, b = torch.randn(m, 2 * k)[:, ::2].to(dtype), torch.randn(k, 2 * n)[:, ::2].to(dtype)
        strided = torch.randn(2 * m, 2 * k).to(dtype)[::2, ::2]
        for left in (a, strided):
            out = gemm.matmul(left, b, torch.full((m, n), 7.0))
            assert torch.allclose(out, left.float() @ b.float(), atol=1e-4)
