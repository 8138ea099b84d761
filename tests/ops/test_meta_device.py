"""On the meta device every op gives shapes and dtypes, forward and backward, as PyTorch's own do."""

from __future__ import annotations

import pytest
import torch

import nitp_ops
from tests.support.budget import outputs


def inputs(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = (2, 5, 6), (11, 6), (8, 6), (8, 6), (6, 8), (2, 5, 6)
    draw = torch.Generator().manual_seed(0)
    floats = [
        torch.randn(shape, generator=draw).to(device, dtype).requires_grad_() for shape in shapes
    ]
    return [*floats, torch.tensor([[1, 2, -100, 4, 10], [0, -100, -100, 3, 5]], device=device)]


CALLS = {
    "mean": lambda h, w, g, u, d, z, y: nitp_ops.linear_cross_entropy(h, w, y),
    "none": lambda h, w, g, u, d, z, y: nitp_ops.linear_cross_entropy(h, w, y, reduction="none"),
    "shared": lambda h, w, g, u, d, z, y: nitp_ops.grouped_linear_cross_entropy(
        [nitp_ops.CrossEntropyTerm(h, y)] * 2, w
    )[0],
    "projector": lambda h, w, g, u, d, z, y: nitp_ops.implicit_token_loss(h, z.detach(), g, u, d),
    "no projector": lambda h, w, g, u, d, z, y: nitp_ops.implicit_token_loss(
        h, z.detach(), None, None, None
    ),
    "alignment": lambda h, w, g, u, d, z, y: nitp_ops.alignment(h, z),
    "swiglu": lambda h, w, g, u, d, z, y: nitp_ops.swiglu(h, z),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("upstream", [1.0, 0.37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_dtypes_are_those_of_a_real_call(call, upstream, dtype):
    real = outputs(call, inputs("cpu", dtype), upstream)
    for a, b in zip(outputs(call, inputs("meta", dtype), upstream), real, strict=True):
        assert a.is_meta and a.shape == b.shape and a.dtype == b.dtype
