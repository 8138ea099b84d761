"""The row kernels of every instruction set that this CPU has, and of any thread count, give the
same numbers."""

import pytest
import torch

import nitp_ops
from nitp_ops import reference
from nitp_ops.core import library
from nitp_ops.kernels import select
from tests.support.budget import near, outputs, widened, within_budget
from tests.support.processor import SETS, parameters

if select.load_error is not None:
    pytest.skip(f"no compiled kernels: {select.load_error}", allow_module_level=True)

BEST = library.instruction_set()
ALL = ("portable", "avx2", "avx512", "avx512_bf16")
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
EVERY_SET = pytest.mark.parametrize("name", parameters(ALL))


@pytest.fixture(autouse=True)
def _back_to_the_best():
    yield
    library.choose_instruction_set(BEST)


def test_the_best_that_the_processor_has_is_chosen():
    assert SETS[-1] == BEST


@EVERY_SET
@DTYPES
@pytest.mark.parametrize("columns", [1, 15, 512, 1537])
def test_cross_entropy_with_every_option(name, dtype, columns):
    library.choose_instruction_set(name)
    assert library.instruction_set() == name
    inputs = [
        torch.randn(7, 5).to(dtype).requires_grad_(),
        torch.randn(columns, 5).to(dtype).requires_grad_(),
    ]
    work = torch.float64 if dtype == torch.float64 else torch.float32
    bias, class_weight = torch.randn(columns, dtype=work), torch.rand(columns, dtype=work)
    labels = torch.randint(0, columns, (7,))
    several, weights = torch.randint(-1, columns, (7, 3)), torch.rand(7, 3, dtype=work)
    for targets, options in (
        (labels, {}),
        (
            labels,
            {
                "bias": bias,
                "softcap": 3.0,
                "logit_scale": 0.7,
                "z_loss": 0.1,
                "label_smoothing": 0.1,
            },
        ),
        (labels, {"class_weight": class_weight, "label_smoothing": 0.2}),
        (several, {"target_weight": weights, "label_smoothing": 0.1, "bias": bias}),
    ):
        ours = outputs(
            lambda h, w, t=targets, o=options: nitp_ops.linear_cross_entropy(h, w, t, **o), inputs
        )
        exact = outputs(
            lambda h, w, t=targets, o=options: reference.linear_cross_entropy(h, w, t, **o),
            widened(inputs),
        )
        near(ours, exact)


@EVERY_SET
def test_the_prediction_is_the_first_of_equal_maxima(name):
    """Of blocks of 512 columns too; 0 where no number is one."""
    library.choose_instruction_set(name)
    logits = torch.zeros(5, 1537)
    logits[0, [37, 512 + 37, 1500]] = 2.0
    logits[1, [513, 516, 1536]] = 2.0
    logits[2], logits[3], logits[4] = -3.0, -torch.inf, torch.nan
    for row, first in zip(logits, (37, 513, 0, 0, 0), strict=True):
        one, label = torch.ones(1, 1), torch.tensor([1])
        _, stats = nitp_ops.linear_cross_entropy(one, row.unsqueeze(1), label, return_stats=True)
        assert stats.prediction.tolist() == [first]


@EVERY_SET
@DTYPES
@pytest.mark.parametrize("distance", ["cosine", "mse", "smooth_l1", "kl"])
def test_alignment_and_swiglu(name, dtype, distance):
    library.choose_instruction_set(name)
    inputs = [torch.randn(9, 301).to(dtype).requires_grad_() for _ in range(2)]
    for ours, exact in (
        (
            lambda a, b: nitp_ops.alignment(a, b, distance=distance),
            lambda a, b: reference.alignment(a, b, distance=distance),
        ),
        (nitp_ops.swiglu, reference.swiglu),
    ):
        got, wide = outputs(ours, inputs), outputs(exact, widened(inputs))
        if dtype == torch.float64:
            near(got, wide)  # float64 cannot judge itself
        else:
            within_budget(got, outputs(exact, inputs), wide)


def test_an_instruction_set_that_is_not_here_is_refused():
    with pytest.raises(
        ValueError, match="name is 'avx1024', expected 'portable' or one that this CPU has"
    ):
        library.choose_instruction_set("avx1024")
    assert library.instruction_set() == BEST


@DTYPES
def test_cross_entropy_is_bitwise_the_same_at_any_thread_count(dtype):
    logits, labels = torch.randn(40, 3001).to(dtype), torch.randint(0, 3001, (40, 1))
    work = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            rows_, stats, target = (
                logits.clone(),
                torch.empty(2, 40, dtype=work),
                torch.empty(40, 1, dtype=work),
            )
            best = torch.empty(40, dtype=torch.int64)
            torch.ops.nitp_ops.cross_entropy_rows_(
                rows_,
                labels,
                None,
                None,
                None,
                None,
                stats,
                target,
                best,
                -100,
                False,
                0.1,
                0.01,
                0.0,
                1.0,
                True,
            )
            results.append((rows_, stats, target, best))
        finally:
            torch.set_num_threads(2)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def every_bfloat16(columns: int) -> torch.Tensor:
    """All 65536 of them in rows, so that vectors, and what is left of a row, hold each kind of
    number."""
    return (
        torch.arange(2**16, dtype=torch.int32)
        .to(torch.int16)
        .view(torch.bfloat16)[: 2**16 // columns * columns]
        .view(-1, columns)
    )


@EVERY_SET
@pytest.mark.parametrize("columns", [1, 64, 77])
@pytest.mark.parametrize("factor", [1.0078125, 0.3333333, 3e-39, 3e38, float("nan"), float("inf")])
def test_bfloat16_is_rounded_to_nearest_even_and_nan_stays_nan(name, columns, factor):
    library.choose_instruction_set(name)
    x = every_bfloat16(columns)
    exact = (x.float() * factor).bfloat16()
    if name == "avx512_bf16":  # its rounding takes subnormal numbers for zero (docs/decisions/0028)
        exact = torch.where((x.float() * factor).abs() < 2.0**-126, exact * 0, exact)
    ours = x.clone()
    torch.ops.nitp_ops.scale_rows_(ours, torch.tensor(factor))
    assert torch.equal(ours.isnan(), exact.isnan())
    assert torch.equal(ours.nan_to_num().view(torch.int16), exact.nan_to_num().view(torch.int16))


@EVERY_SET
@pytest.mark.parametrize("columns", [1, 64, 77])
def test_swiglu_of_every_bfloat16_gate_is_right_to_a_rounding(name, columns):
    library.choose_instruction_set(name)
    gate = every_bfloat16(columns).clone()
    # infinity times zero is no number, and the product may overflow
    gate[~(gate.abs() < 2.0**126)] = 0
    inputs = [gate.requires_grad_(), torch.full_like(gate, -1.5, requires_grad=True)]
    upstream = torch.full_like(gate, 0.75)
    ours = outputs(nitp_ops.swiglu, inputs, upstream)
    exact = outputs(reference.swiglu, widened(inputs), upstream.double())
    for got, wide in zip(ours, exact, strict=True):
        # 1e-6: where the derivative in the gate crosses zero, and far below
        assert ((got.double() - wide).abs() <= 2.0**-8 * wide.abs() + 1e-6).all()
