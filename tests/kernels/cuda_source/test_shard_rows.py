"""The row kernels of a sharded vocabulary in CUDA and Triton, run on the CPU, equal their formulas."""

from importlib import util

import pytest
import torch

import tests.kernels.shard_rows_cases as cases
from tests.kernels.cuda_source.build_for_cpu import choose, placed, simt, untouched
from tests.support.budget import near
from tests.support.interpreter import COLUMNS, FLOATS, apart, equal

pytestmark = pytest.mark.gpu_source

DTYPES = pytest.mark.parametrize("dtype", FLOATS)
ORDERS = ("forward", "backward", "shuffled")


@DTYPES
@pytest.mark.parametrize("columns", [1, 7, 33, 1000])
def test_cuda_partials_and_gradient(dtype, columns):
    simt()
    for place, given in enumerate(cases.options(columns, dtype)):
        choose(ORDERS[place % 3])
        for smoothing, entropy in ((0.0, False), (0.3, True)):
            options = {**given, "smoothing": smoothing, "entropy": entropy}
            arguments = cases.partials_arguments((3 * torch.randn(3, columns)).to(dtype), **options)
            torch.ops.nitp_simt.cross_entropy_rows_(*arguments)
            near(
                list(arguments[-1]),
                list(cases.partials_by_formula(arguments[0], **options)),
                list(cases.PARTIALS),
            )
        for targets in (1, 40):
            logits = placed((2 * torch.randn(3, columns)).to(dtype), place, columns + 3)
            arguments = cases.gradient_arguments(logits, **given, targets=targets)
            expected = cases.gradient_by_formula(arguments)
            torch.ops.nitp_simt.cross_entropy_gradient_rows_(*arguments)
            assert untouched(logits) and not logits[1].any()
            near([logits], [expected])
    choose()


@pytest.mark.skipif(util.find_spec("triton") is None, reason="triton is not installed")
@DTYPES
@pytest.mark.parametrize("columns", COLUMNS)
def test_triton_partials_and_gradient(dtype, columns):
    for given in cases.options(columns, dtype):
        for smoothing, entropy in ((0.0, False), (0.3, True)):
            options = {**given, "smoothing": smoothing, "entropy": entropy}
            equal(
                "cross_entropy_rows_",
                *cases.partials_arguments(
                    apart((3 * torch.randn(3, columns)).to(dtype)), **options
                ),
            )
        logits = apart((2 * torch.randn(3, columns)).to(dtype))
        equal("cross_entropy_gradient_rows_", *cases.gradient_arguments(logits, **given, targets=4))
