"""What a head may be, and how its weight is read: in its call, between its hooks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nitp_ops.objectives import build
from tests.support.objectives_cases import INFO, assert_same, gradients, make_batch


class ShardedHead(nn.Linear):
    """A head whose weight is only there between its forward hooks, like one under FSDP or ZeRO-3."""

    def __init__(self, head: nn.Linear):
        super().__init__(head.in_features, head.out_features, bias=False, dtype=torch.float64)
        self.full = head.weight.detach().clone()
        self.shard()
        self.register_forward_pre_hook(lambda *_: self.gather())
        self.register_forward_hook(lambda *_: self.shard())

    def gather(self) -> None:
        self.weight.data = self.full

    def shard(self) -> None:
        self.weight.data = torch.full_like(self.full, torch.nan)


def test_the_weight_of_a_hooked_head_is_read_between_its_hooks():
    batch = make_batch(bias=False)
    objective = build("ntp + again: 0.5*ntp(z_loss=0.1)", model=INFO)
    expected = objective(batch.streams()).loss
    head = ShardedHead(batch.head)
    loss = objective(batch.streams(head=head)).loss
    plain = gradients(expected, [batch.hidden, batch.head.weight])
    hooked = gradients(loss, [batch.hidden, head.weight])
    assert all(torch.equal(a, b) for a, b in zip(plain, hooked, strict=True))
    assert "forward" not in head.__dict__ and head.weight.isnan().all()


@pytest.mark.parametrize(
    "spec", ["ntp", "nextlat", "ntp + mtp_shared + mtp_sequential + nextlat + last: 0*nextlat"]
)
def test_all_readers_of_the_head_share_one_call_and_hooks_see_nothing_of_it(spec: str):
    batch, seen = make_batch(), []
    expected = build(spec, model=INFO)
    plain = expected(batch.streams()).loss
    batch.head.register_forward_pre_hook(lambda module, args: seen.extend(args))
    batch.head.register_forward_hook(lambda module, args, output: seen.append(output))
    assert_same(expected(batch.streams()).loss, plain, batch.leaves)
    assert [x.tolist() for x in seen] == [[0.0], [0.0]]


def test_a_head_that_fails_gets_its_own_forward_back():
    batch = make_batch()
    batch.head.register_forward_pre_hook(lambda *_: None)
    own = batch.head.forward = batch.head.forward
    with pytest.raises(IndexError):
        build("ntp", model=INFO)(batch.streams(labels=batch.ids + 100))
    assert batch.head.__dict__["forward"] is own


def test_a_leaf_tensor_is_a_head():
    batch = make_batch(bias=False)
    objective = build("ntp", model=INFO)
    assert_same(
        objective(batch.streams(head=batch.head.weight)).loss,
        objective(batch.streams()).loss,
        batch.leaves,
    )


class Adapter(nn.Module):
    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda head: head.weight * 1, "head is a non-leaf tensor"),
        (lambda head: Adapter(head), "head is a Adapter with submodules base_layer"),
        (lambda head: nn.Identity(), "head is a Identity, expected a module with a weight"),
        (lambda head: "lm_head", "head is a str"),
        (
            lambda head: nn.Linear(6, 12),
            r"^objective: head has a weight of shape \(12, 6\), "
            r"expected \(11, 6\) \(Mo",
        ),
        (
            lambda head: nn.Linear(5, 11),
            r"^objective: head has a weight of shape \(11, 5\), "
            r"expected \(11, 6\) \(Mo",
        ),
    ],
)
def test_what_is_no_head_is_refused(make, message: str):
    batch = make_batch()
    with pytest.raises((TypeError, ValueError), match=message):
        build("ntp", model=INFO)(batch.streams(head=make(batch.head)))


def test_a_frozen_head_gets_no_gradient_and_changes_no_other():
    batch = make_batch()
    objective = build("ntp", model=INFO)
    (expected,) = gradients(objective(batch.streams()).loss, [batch.hidden])
    batch.head.requires_grad_(False)
    out = objective(batch.streams())
    out.loss.backward()
    assert batch.head.weight.grad is None and batch.hidden.grad is not None
    torch.testing.assert_close(batch.hidden.grad, expected)


def test_a_forward_of_the_heads_own_is_there_again_after_the_pass():
    batch = make_batch()
    seen, plain = [], batch.head.forward

    def own(input: Tensor) -> Tensor:
        return plain(input)

    batch.head.forward = own  # type: ignore[method-assign]
    batch.head.register_forward_pre_hook(lambda module, args: seen.append(module))
    build("ntp", model=INFO)(batch.streams())
    assert seen == [batch.head] and vars(batch.head)["forward"] is own
