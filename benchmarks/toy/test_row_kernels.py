"""`pytest benchmarks --benchmark-only`: every row kernel alone on CPU at toy sizes, beside a copy
of the same bytes."""

import pytest
import torch

from benchmarks.suites.row_kernels import dtypes_of
from nitp_ops.kernels import select
from nitp_ops.kernels.table import all_kernels

#: Sizes at which calling costs more than computing.
TOY = 8, 32
#: Kernels that a CPU has.
SERVED = [
    name
    for name in all_kernels()
    if select.load_error is None and hasattr(torch.ops.nitp_ops, name)
]
CASES = [(kernel, dtype) for kernel in SERVED for dtype in dtypes_of(kernel)]


@pytest.mark.parametrize("who", ["copy", "kernel"])
@pytest.mark.parametrize(("kernel", "dtype"), CASES)
def test_one_call(benchmark, kernel, dtype, who):
    torch.manual_seed(0)
    call = all_kernels()[kernel].sample(*TOY, getattr(torch, dtype))
    before = [each.clone() for each in call.arguments if isinstance(each, torch.Tensor)]
    source = torch.zeros(call.moved // 2, dtype=torch.uint8)
    copied = torch.empty_like(source)
    run = getattr(select.row_kernels("native"), kernel)
    benchmark.group = f"{kernel} {dtype}"
    if who == "copy":
        benchmark.pedantic(copied.copy_, (source,), rounds=20, warmup_rounds=2)
        return

    def restore() -> None:  # what `setup` returns would be taken for arguments
        call.restore()

    benchmark.pedantic(run, call.arguments, setup=restore, rounds=20, warmup_rounds=2)
    after = [each for each in call.arguments if isinstance(each, torch.Tensor)]
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
