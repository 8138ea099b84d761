"""`LinearCrossEntropy`: the op's options held by a module."""

import pickle
from typing import Any

import pytest
import torch

import nitp_ops


def given():
    hidden, weight = torch.randn(3, 5, 8).requires_grad_(), torch.randn(33, 8).requires_grad_()
    return hidden, weight, torch.randint(0, 33, (3, 5))


def test_a_call_is_the_op_with_the_modules_options():
    inputs = given()
    options: dict[str, Any] = {"z_loss": 0.1, "softcap": 5.0, "label_smoothing": 0.1}
    module = nitp_ops.LinearCrossEntropy(**options)
    assert not list(module.parameters()) and not module.state_dict()
    ours, theirs = module(*inputs), nitp_ops.linear_cross_entropy(*inputs, **options)
    assert torch.equal(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours, inputs[:2]), torch.autograd.grad(theirs, inputs[:2]), strict=True
    ):
        assert torch.equal(a, b)


def test_an_option_of_the_call_takes_the_place_of_the_modules():
    inputs, token_weight = given(), torch.rand(3, 5)
    module = pickle.loads(pickle.dumps(nitp_ops.LinearCrossEntropy(z_loss=0.1, reduction="sum")))
    loss = module(*inputs, z_loss=0.0, token_weight=token_weight)
    expected = nitp_ops.linear_cross_entropy(*inputs, reduction="sum", token_weight=token_weight)
    assert torch.equal(loss, expected)


@pytest.mark.parametrize(("name", "hint"), [("zloss", ". Did you mean z_loss?"), ("inplace", "")])
def test_an_unknown_option_is_refused_when_it_is_made(name, hint):
    with pytest.raises(TypeError) as error:
        nitp_ops.LinearCrossEntropy(**{name: 1})
    message = str(error.value)
    assert message.startswith(
        f"LinearCrossEntropy: {name} is no option, expected one of bias, ignore_index, "
    )
    assert message.endswith(hint) and ("Did you mean" in message) == bool(hint)


def test_it_compiles_as_a_part_of_a_model():
    inputs, module = given(), nitp_ops.LinearCrossEntropy(z_loss=0.1)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), module(*inputs))
