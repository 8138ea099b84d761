"""`pytest benchmarks --benchmark-only`: one forward and backward of every op at toy sizes, for a
quick comparison.

The sizes are far too small to judge speed; `python -m benchmarks` is for that.
"""

from collections.abc import Callable

import pytest
import torch

from benchmarks.cases import OPS
from benchmarks.implementations import forward, step


@pytest.mark.parametrize("name", ["floor", "ours", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_one_forward_and_backward(benchmark, op, dtype, name):
    inputs = op.inputs(op.toy, dtype)
    run: Callable[[], object] = op.floor(op.toy, dtype)
    if name != "floor":
        function = forward(op.name, name)

        def run() -> object:
            return step(function, inputs)

    benchmark.group = f"{op.name} {dtype}"
    benchmark.pedantic(run, setup=inputs.clear, rounds=20, warmup_rounds=2)
    assert name == "floor" or all(leaf.grad is not None for leaf in inputs.leaves.values())
