"""`nitp_ops.geometry` on tensors of a device that has no float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

from nitp_ops import geometry
from tests.geometry.test_geometry import FUNCTIONS, gaussian


class WithoutFloat64(torch.Tensor):
    """Says that it lies on such a device, which `cpu()` and `to` leave; an operation there makes no
    float64."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func == torch.Tensor.device.__get__:
            return torch.device("mps")
        if func is torch.Tensor.cpu or (func is torch.Tensor.to and args[1] == torch.device("cpu")):
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(torch.Tensor)
        found = super().__torch_function__(func, types, args, kwargs or {})
        for value in tree_leaves(found):
            assert not isinstance(value, torch.Tensor) or value.dtype != torch.float64, (
                f"{func} makes a float64 tensor"
            )
        return found


def there(x: torch.Tensor) -> torch.Tensor:
    return x.as_subclass(WithoutFloat64)


def test_the_tensor_refuses_float64():
    with pytest.raises(AssertionError, match="makes a float64 tensor"):
        there(torch.ones(2)).double()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_measure_is_that_of_the_cpu(name):
    x = gaussian(30, 7).float()
    assert FUNCTIONS[name](there(x)) == FUNCTIONS[name](x)


def test_an_accumulator_is_that_of_the_cpu():
    x = gaussian(30, 7).float()
    here, elsewhere = geometry.Accumulator(7), geometry.Accumulator(7)
    for part in x.split(11):
        here.update(part)
        elsewhere.update(there(part))
    assert elsewhere.compute() == here.compute()


@pytest.mark.parametrize("probe", [geometry.linear_probe, geometry.knn_probe])
def test_a_probe_is_that_of_the_cpu(probe):
    hidden = gaussian(8 * 16, 6).float().reshape(8, 16, 6)
    token_ids = torch.arange(8 * 16).reshape(8, 16) % 5
    held_out = torch.arange(8) % 2 == 0
    found = probe(there(hidden), there(token_ids), held_out=there(held_out))
    assert found == probe(hidden, token_ids, held_out=held_out)
