"""torch.export with a changing number of rows, make_fx, torch.func.functionalize: traced, or
refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import nitp_ops
from nitp_ops import CrossEntropyTerm


class Model(nn.Module):
    """Calls one op on hidden states [B, T, 6], labels [B, T] and targets [B, T, 6], with weights of
    its own."""

    def __init__(self, call: Callable[..., Any]):
        super().__init__()
        self.call = call
        self.head, self.down = nn.Parameter(torch.randn(11, 6)), nn.Parameter(torch.randn(6, 8))
        self.gate, self.up = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(8, 6))

    def forward(self, hidden: Tensor, labels: Tensor, target: Tensor) -> Any:
        return self.call(self, hidden, labels, target)


CALLS: dict[str, Callable[..., Any]] = {
    "mean": lambda m, h, y, z: nitp_ops.linear_cross_entropy(h, m.head, y),
    "none": lambda m, h, y, z: nitp_ops.linear_cross_entropy(
        h, m.head, y, reduction="none", token_weight=z[..., 0]
    ),
    "stats": lambda m, h, y, z: nitp_ops.linear_cross_entropy(
        h, m.head, y, class_weight=torch.ones(11), return_stats="entropy"
    ),
    "targets": lambda m, h, y, z: nitp_ops.linear_cross_entropy(
        h, m.head, torch.stack([y, y], -1), target_weight=torch.ones(*y.shape, 2)
    ),
    "shared": lambda m, h, y, z: nitp_ops.grouped_linear_cross_entropy(
        [CrossEntropyTerm(h, y), CrossEntropyTerm(z, y)], m.head
    ),
    "latent": lambda m, h, y, z: nitp_ops.implicit_token_loss(
        h, z, m.gate, m.up, m.down, valid=y > 3, return_stats=True
    ),
    "alignment": lambda m, h, y, z: nitp_ops.alignment(h, z),
    "swiglu": lambda m, h, y, z: nitp_ops.swiglu(h, z),
}
EVERY = pytest.mark.parametrize("name", CALLS)


def inputs(batch: int = 2, length: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    shape = batch, length
    return torch.randn(*shape, 6), torch.randint(0, 11, shape), torch.randn(*shape, 6)


def agree(ours: Any, expected: Any) -> None:
    for a, b in zip(tree_leaves(ours), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@EVERY
def test_an_exported_op_takes_any_number_of_rows(name: str):
    model, dynamic = Model(CALLS[name]), {0: Dim("batch", max=64), 1: Dim("length", min=3, max=64)}
    program = export(model, inputs(), dynamic_shapes=(dynamic,) * 3, strict=False).module()
    for batch, length in ((3, 7), (1, 4)):
        given = inputs(batch, length)
        agree(program(*given), model(*given))


@EVERY
def test_make_fx_traces_real_tensors(name: str):
    model, given = Model(CALLS[name]), inputs()
    agree(make_fx(model)(*given)(*given), model(*given))


@EVERY
def test_make_fx_traces_the_backward_pass_of_real_tensors(name: str):
    model, given = Model(CALLS[name]), inputs()

    def gradient(hidden: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        hidden = hidden.detach().requires_grad_()
        out = next(x for x in tree_leaves(model(hidden, labels, target)) if x.requires_grad)
        return torch.autograd.grad(out, hidden, 0.37 * torch.ones_like(out))[0]

    agree(make_fx(gradient)(*given)(*given), gradient(*given))


@EVERY
def test_functionalize_is_refused_by_name(name: str):
    model, given = Model(CALLS[name]), inputs()
    refusal = (
        r"^\w+: a torch.func transform \(.*functionalize\) is not supported, expected reverse mode"
    )
    with pytest.raises(NotImplementedError, match=refusal):
        torch.func.functionalize(model)(*given)
    with pytest.raises(NotImplementedError, match=refusal):  # labels are no argument
        torch.func.functionalize(lambda hidden, third: model(hidden, given[1], third))(
            given[0], given[2]
        )
    if name not in ("alignment", "swiglu"):  # labels, or the pairs that count, alone
        for transform, labels in (
            (torch.func.functionalize, given[1]),
            (torch.vmap, given[1][None]),
        ):
            with pytest.raises(NotImplementedError, match=refusal):
                transform(lambda labels: model(given[0], labels, given[2]))(labels)
