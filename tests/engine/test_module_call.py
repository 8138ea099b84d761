"""What is computed inside a module's call is out of its hooks' sight, and in their order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nitp_ops import TokenStats
from nitp_ops.engine.modules.module_call import inside_call


def casting(module: nn.Module) -> list[str]:
    """Hooks as an engine's: they cast every float that enters or leaves, and log when gradients
    pass."""
    passed: list[str] = []

    def logged(tensor: Any, name: str) -> Tensor:
        passed.append(name)
        narrow = tensor.bfloat16()
        if narrow.requires_grad:
            narrow.register_hook(lambda _: passed.append(f"{name} gradient"))
        return narrow

    module.register_forward_pre_hook(lambda _, args: tuple(logged(x, "enters") for x in args))
    module.register_forward_hook(lambda _, args, output: logged(output, "leaves"))
    return passed


def test_hooks_run_in_order_and_change_nothing():
    module = nn.Linear(4, 3)
    x, frozen = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    passed = casting(module)
    differentiated: list[str] = []

    def use(x: Tensor, frozen: Tensor, option: str) -> tuple[Tensor, Tensor, str]:
        z = nn.functional.linear(x, module.weight) + frozen.sum()
        z.register_hook(lambda _: differentiated.append(f"after {passed[-1]}"))
        return z.square().sum(), z.detach(), option

    loss, z, option = inside_call(module, [x, frozen, "as it is"], use)
    assert (
        option == "as it is"
        and loss.dtype == z.dtype == torch.float32
        and passed == ["enters", "leaves"]
    )
    loss.backward()
    # parameters are there before anything is differentiated, and left alone when all is
    assert differentiated == ["after leaves gradient"] and passed[2:] == [
        "leaves gradient",
        "enters gradient",
    ]
    mine = [x.grad, module.weight.grad]
    x.grad = module.weight.grad = None
    (nn.functional.linear(x, module.weight) + frozen.sum()).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(mine, [x.grad, module.weight.grad], strict=True))  # type: ignore[arg-type]


def test_a_gradient_can_be_differentiated_again():
    module, x = nn.Linear(4, 3), torch.randn(5, 4, requires_grad=True)
    casting(module)
    y = inside_call(module, [x], lambda x: x.pow(3).sum())
    (once,) = torch.autograd.grad(y, x, create_graph=True)
    (twice,) = torch.autograd.grad(once.sum(), x)
    torch.testing.assert_close(twice, 6 * x)


@pytest.mark.parametrize("trained", [True, False])
def test_inputs_without_a_gradient_leave_one_to_the_parameters(trained: bool):
    module = nn.Linear(4, 3).requires_grad_(trained)
    passed = casting(module)
    stats = inside_call(
        module,
        [torch.ones(2, 4)],
        lambda x: TokenStats(*[(x @ module.weight.T).sum(-1)] * len(TokenStats._fields)),
    )
    assert isinstance(stats, TokenStats) and stats.loss.requires_grad == trained
    if trained:
        stats.loss.sum().backward()
        assert module.weight.grad is not None and passed == ["enters", "leaves", "leaves gradient"]


def test_no_graph_is_built_without_gradients():
    module, x = nn.Linear(4, 3), torch.randn(5, 4, requires_grad=True)
    casting(module)
    with torch.no_grad():
        assert not inside_call(module, [x], lambda x: x.sum()).requires_grad


def test_a_failure_leaves_the_module_as_it_was():
    module = nn.Linear(4, 3)
    casting(module)

    def fails(x: Tensor) -> Any:
        raise IndexError("inside")

    with pytest.raises(IndexError, match="inside"):
        inside_call(module, [torch.ones(2, 4)], fails)
    assert "forward" not in module.__dict__


def test_it_is_compiled_into_one_graph():
    module, x = nn.Linear(4, 3), torch.randn(5, 4, requires_grad=True)
    module.register_forward_pre_hook(lambda _, args: None)

    def loss(x: Tensor) -> Tensor:
        return inside_call(
            module, [x], lambda x: nn.functional.linear(x, module.weight).square().sum()
        )

    (expected,) = torch.autograd.grad(loss(x), x)
    (mine,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(x), x)
    torch.testing.assert_close(mine, expected)
