"""The GEMMs on a GPU: a setting that lets cuBLAS add parts of a sum in bfloat16 changes no result
of this library."""

import pytest
import torch

import nitp_ops
from nitp_ops.core import gemm
from tests.gpu.gpu_cases import DEVICE, ON_GPU, normal

pytestmark = ON_GPU
FLAGS = {
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    torch.float16: "allow_fp16_reduced_precision_reduction",
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_long_sum_of_few_rows_is_never_reduced_in_a_narrow_dtype(monkeypatch, dtype):
    rows, width, columns = 64, 1024, 128256
    upstream, weight = (
        normal(rows, columns, dtype=dtype),
        normal(columns, width, seed=1, dtype=dtype),
    )
    exact = upstream.double() @ weight.double()
    found = []
    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cuda.matmul, FLAGS[dtype], allowed)
        found.append(
            gemm.matmul(upstream, weight, torch.empty(rows, width, dtype=dtype, device=DEVICE))
        )
    assert torch.equal(*found)
    assert (found[0].double() - exact).norm() <= 1.05 * (exact.to(dtype).double() - exact).norm()


@pytest.mark.parametrize("vocabulary", [50257, 128256])
def test_a_head_gives_the_same_bits_whether_the_setting_is_on_or_off(monkeypatch, vocabulary):
    found = []
    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cuda.matmul, FLAGS[torch.bfloat16], allowed)
        hidden = normal(64, 1024, dtype=torch.bfloat16).requires_grad_()
        weight = normal(
            vocabulary, 1024, seed=1, scale=1 / 32, dtype=torch.bfloat16
        ).requires_grad_()
        labels = torch.arange(64, device=DEVICE) * 7
        loss = nitp_ops.linear_cross_entropy(hidden, weight, labels)
        found.append([loss.detach(), *torch.autograd.grad(loss, [hidden, weight])])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_float32_logits_are_those_of_widened_operands():
    hidden, weight = (
        normal(512, 256, dtype=torch.bfloat16),
        normal(5003, 256, seed=1, dtype=torch.bfloat16),
    )
    labels = torch.arange(512, device=DEVICE)
    narrow = nitp_ops.linear_cross_entropy(hidden, weight, labels, logits_dtype=torch.float32)
    wide = nitp_ops.linear_cross_entropy(hidden.float(), weight.float(), labels)
    torch.testing.assert_close(narrow, wide, rtol=1e-5, atol=0)
