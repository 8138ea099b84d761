"""The two row kernels of a sharded vocabulary equal their formulas, on every instruction set of
this CPU."""

import pytest
import torch

import tests.kernels.shard_rows_cases as cases
from nitp_ops.core import library
from nitp_ops.kernels import select
from tests.support.budget import near

if select.load_error is not None:
    pytest.skip(f"no compiled kernels: {select.load_error}", allow_module_level=True)

BEST = library.instruction_set()
ALL = ("portable", "avx2", "avx512", "avx512_bf16")
SETS = ALL[: ALL.index(BEST) + 1]
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
COLUMNS = pytest.mark.parametrize("columns", [1, 15, 512, 1537])


@pytest.fixture(params=SETS)
def kernels(request):
    library.choose_instruction_set(request.param)
    yield torch.ops.nitp_ops
    library.choose_instruction_set(BEST)


@DTYPES
@COLUMNS
def test_the_softmax_partials_of_a_row(kernels, dtype, columns):
    for given in cases.options(columns, dtype):
        for smoothing, entropy in ((0.0, False), (0.1, False), (0.0, True), (0.3, True)):
            options = {**given, "smoothing": smoothing, "entropy": entropy}
            arguments = cases.partials_arguments((3 * torch.randn(3, columns)).to(dtype), **options)
            kernels.cross_entropy_rows_(*arguments)
            near(
                list(arguments[-1]),
                list(cases.partials_by_formula(arguments[0], **options)),
                list(cases.PARTIALS),
            )


@DTYPES
@COLUMNS
def test_the_gradient_of_a_row(kernels, dtype, columns):
    for given in cases.options(columns, dtype):
        for targets in (1, 4):
            arguments = cases.gradient_arguments(
                (2 * torch.randn(3, columns)).to(dtype), **given, targets=targets
            )
            expected = cases.gradient_by_formula(arguments)
            kernels.cross_entropy_gradient_rows_(*arguments)
            assert not arguments[0][1].any()
            near([arguments[0]], [expected])


def test_a_target_of_weight_zero_leaves_what_the_row_got():
    logits = torch.zeros(1, 4)
    grad_coeffs = torch.tensor([[0.0], [1.0], [0.0]])
    torch.ops.nitp_ops.cross_entropy_gradient_rows_(
        logits,
        torch.tensor([[2]]),
        torch.zeros(1, 1),
        torch.full((1, 1), float("nan")),
        None,
        None,
        grad_coeffs,
        0.0,
        1.0,
    )
    assert torch.equal(logits, torch.ones(1, 4))
