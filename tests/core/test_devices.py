"""What is asked of devices that have neither float64 nor frexp."""

import math

import pytest
import torch

import nitp_ops
from nitp_ops import reference
from nitp_ops.core import devices, library
from nitp_ops.kernels import select


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_powers_of_two_are_exact_and_near(dtype):
    limits = torch.finfo(dtype)
    places = torch.arange(int(math.log2(limits.tiny)), int(math.log2(limits.max)) - 1)
    x = torch.ldexp(torch.ones(len(places), dtype=dtype), places) * 1.4
    found = reference.power_of_two(-x)
    assert all(math.frexp(value)[0] == 0.5 for value in found.tolist())
    assert bool(((found <= 2 * x) & (x <= 2 * found)).all())
    assert bool((1 / found >= limits.tiny).all()) and bool((1 / found).isfinite().all())


def test_a_number_without_a_size_has_the_power_one():
    odd = torch.tensor([0.0, math.inf, -math.inf, math.nan])
    assert reference.power_of_two(odd).tolist() == [1.0] * 4
    subnormal = reference.power_of_two(torch.tensor([1e-45]))
    assert subnormal.item() == torch.finfo(torch.float32).tiny


def test_sums_are_float64_where_the_device_has_it():
    assert devices.sum_dtype(torch.device("cuda")) is torch.float64
    assert (
        devices.sum_dtype(torch.device("mps"))
        is devices.sum_dtype(torch.device("xpu"))
        is torch.float32
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_the_cuda_kernels_say_why_they_cannot_run():
    if select.load_error is not None or "cuda" not in select._COMPILED_FOR:
        pytest.skip("the library was built without nvcc")
    assert "cuda:0: " in (library.cuda_refusal(0) or "")


def test_a_device_that_the_compiled_kernels_refuse_is_left_to_others(monkeypatch):
    device, reason = (
        torch.device("cuda", 1),
        "the compiled kernels cannot run on cuda:1: no kernel image",
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(select, "_COMPILED_FOR", {"cpu", "meta", "cuda"})
    monkeypatch.setattr(library, "cuda_refusal", lambda index: reason if index == 1 else None)
    monkeypatch.setattr(select, "triton_unavailable_reason", lambda: None)
    assert select.select_backend("swiglu", device, None) == "triton"
    assert select.select_backend("swiglu", torch.device("cuda", 0), None) == "native"
    with pytest.raises(
        nitp_ops.BackendError,
        match=r"backend='native' does not serve cuda.*no "
        r"kernel image",
    ):
        select.select_backend("swiglu", device, "native")
