"""tap: exactly the required streams of an ordinary model's forward pass, without a copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nitp_ops.attaching import Tap, tap
from nitp_ops.attaching.hook_points import Sites
from nitp_ops.objectives import ModelInfo, Need, build

INFO = ModelInfo(hidden_size=8, vocab_size=16, num_layers=3, dtype=torch.float64)
NAMES: dict[str, Any] = {
    "blocks": "trunk.h",
    "norm": "trunk.ln_f",
    "embed": "trunk.wte",
    "head": "lm_head",
}


def state(k: int, *, grad: bool = False) -> Need:
    return Need("hidden_states", layer=k, grad=grad)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Model(nn.Module):
    """Its forward gives the logits of the last position only, as nanoGPT's does without targets."""

    def __init__(self) -> None:
        super().__init__()
        embed, blocks = nn.Embedding(16, 8), nn.ModuleList(Block() for _ in range(3))
        self.trunk = nn.ModuleDict({"wte": embed, "h": blocks, "ln_f": nn.LayerNorm(8)})
        self.lm_head = nn.Linear(8, 16, bias=False)
        self.reentrant: bool | None = None

    def forward(self, ids: Tensor) -> Tensor:
        x = self.trunk["wte"](ids)
        for block in self.trunk["h"]:  # type: ignore[union-attr]
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.lm_head(self.trunk["ln_f"](x)[:, [-1]])

    def streams(self, ids: Tensor) -> list[Tensor]:
        """[embedding output, after each block, after the final norm]."""
        states = [self.trunk["wte"](ids)]
        for block in self.trunk["h"]:  # type: ignore[union-attr]
            states.append(block(states[-1]))
        return [*states, self.trunk["ln_f"](states[-1])]


@pytest.fixture
def model() -> Model:
    return Model().double()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(16, (2, 6))


def test_it_collects_what_is_required_and_nothing_else(model: Model, ids: Tensor):
    streams = (Need(name) for name in ("token_ids", "last_hidden", "last_residual", "head"))
    tapped = tap(model, {*streams, state(0), state(2), state(3)}, **NAMES)
    with tapped:
        model(ids)
    streams, states = tapped.streams(token_ids=ids), model.streams(ids)
    assert torch.equal(streams.last_hidden, states[-1]) and torch.equal(
        streams.last_residual, states[3]
    )
    assert (
        streams.hidden_states.keys() == {0, 2, 3}
        and streams.embed is None
        and streams.head is model.lm_head
    )
    assert all(torch.equal(value, states[k]) for k, value in streams.hidden_states.items())
    assert streams.last_hidden.requires_grad and not any(
        s.requires_grad for s in streams.hidden_states.values()
    )


def test_nothing_is_copied_and_what_was_collected_is_handed_out_once(model: Model, ids: Tensor):
    seen = []
    block = model.trunk["h"][1]  # type: ignore[index]
    block.register_forward_hook(lambda module, args, output: seen.append(output.data_ptr()))
    tapped = tap(model, {state(2)}, **NAMES)
    with tapped:
        model(ids)
    assert tapped.streams(token_ids=ids).hidden_states[2].data_ptr() == seen[0]
    with pytest.raises(RuntimeError, match=r"hidden_states\[2\] did not pass"):
        tapped.streams(token_ids=ids)


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_three_lines_train_the_formula_under_every_checkpointing(
    model: Model, ids: Tensor, stop_gradient: bool, reentrant: bool | None, inside: bool
):
    spec = f"ntp + nitp(target_layer=2, projector=none, stop_gradient={stop_gradient})"
    objective = build(spec, model=INFO)
    states = model.streams(ids)
    h, s = states[-1], states[2].detach() if stop_gradient else states[2]
    expected = F.cross_entropy(model.lm_head(h)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected = expected + (1 - F.cosine_similarity(h[:, :-1], s[:, 1:], dim=-1)).mean()
    reference = torch.autograd.grad(expected, list(model.parameters()))
    model.reentrant = reentrant
    tapped = tap(model, objective, **NAMES)
    with tapped:
        model(ids)
        if inside:  # blocks run again inside backward, while the hooks are there
            loss = objective(tapped.streams(token_ids=ids)).loss
            loss.backward()
            # nothing of the second run was collected
            with pytest.raises(RuntimeError, match=r"hidden_states\[2\], last_hidden did not pass"):
                tapped.streams(token_ids=ids)
    if not inside:
        loss = objective(tapped.streams(token_ids=ids)).loss
        loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for parameter, gradient in zip(model.parameters(), reference, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


def test_both_last_streams_carry_gradients(model: Model, ids: Tensor):
    tapped = tap(model, {Need("last_hidden"), Need("last_residual")}, **NAMES)
    with tapped:
        model(ids)
    streams, states = tapped.streams(token_ids=ids), model.streams(ids)
    for mine, expected in ((streams.last_hidden, states[-1]), (streams.last_residual, states[3])):
        assert mine is not None
        table: Any = model.trunk["wte"].weight
        found, wanted = (
            torch.autograd.grad(x.sum(), table, retain_graph=True)[0] for x in (mine, expected)
        )
        assert torch.equal(found, wanted)


def test_hooks_leave_with_the_context_also_after_an_error(model: Model, ids: Tensor):
    tapped = tap(model, build("ntp + nitp", model=INFO), **NAMES)
    with pytest.raises(IndexError), tapped:
        model(ids + 100)
    with tapped:
        model(ids)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    tapped.streams(token_ids=ids)


def test_a_stream_that_did_not_pass_or_passed_twice_is_an_error(model: Model, ids: Tensor):
    tapped = tap(model, {Need("last_hidden")}, **NAMES)
    with (
        pytest.raises(
            RuntimeError, match="tap: last_hidden did not pass, expected a forward pass inside"
        ),
        tapped,
    ):
        pass
    with (
        pytest.raises(RuntimeError, match="last_hidden passed twice, expected one forward pass"),
        tapped,
    ):
        model(ids)
        model(ids)


def test_a_model_that_is_compiled_is_tapped_after_install_and_an_error_without(
    model: Model, ids: Tensor
):
    objective = build("ntp + nitp(target_layer=1)", model=INFO)
    late = tap(model, objective, **NAMES)
    with late:
        model(ids)
    expected = objective(late.streams(token_ids=ids)).loss
    early = tap(model, objective, **NAMES).install()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        with early:
            compiled(ids)
        assert torch.equal(objective(early.streams(token_ids=ids)).loss, expected)
    early.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(ids)
    with (
        pytest.raises(
            RuntimeError,
            match=r"torch.compile ignores hooks that come after it: "
            r"install\(\) the tap first",
        ),
        late,
    ):
        compiled(ids)


def test_blocks_may_be_modules_in_any_container_and_take_keywords(ids: Tensor):
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleDict({"0": Block(), "1": Block()})
            self.embed, self.norm = nn.Embedding(16, 8), nn.LayerNorm(8)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            for block in self.blocks.values():
                x = block(x=x)
            return self.norm(x)

    model = Keywords()
    for blocks in ("blocks", model.blocks, list(model.blocks.values()), ["blocks.0", "blocks.1"]):
        tapped = tap(model, {state(1)}, blocks=blocks)
        with tapped:
            model(ids)
        expected = model.blocks["0"](model.embed(ids))
        assert torch.equal(tapped.streams(token_ids=ids).hidden_states[1], expected)


@pytest.mark.parametrize(
    ("requires", "changes", "error", "message"),
    [
        (
            {Need("last_hidden")},
            {"norm": None},
            ValueError,
            r"norm is None, expected a module or its name \(last_hidden is",
        ),
        (
            {state(1)},
            {"blocks": None},
            ValueError,
            r"blocks is None, expected the transformer "
            r"blocks",
        ),
        ({state(4)}, {}, ValueError, r"hidden_states\[4\] is required, expected at most 3"),
        (
            {Need("head")},
            {"head": None},
            ValueError,
            r"head is None, expected a module or its "
            r"name",
        ),
        (
            {Need("head")},
            {"head": "unembed"},
            ValueError,
            r"head is 'unembed', expected a module of the Model \(which has",
        ),
        ({Need("embed")}, {"embed": 3}, TypeError, "embed is a int, expected a module or its name"),
        (
            {state(1)},
            {"blocks": 3},
            TypeError,
            "blocks is a int, expected a list of modules or its name",
        ),
    ],
    ids=str,
)
def test_bad_arguments_are_named(
    model: Model, requires: set, changes: dict, error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        tap(model, requires, **{**NAMES, **changes})


def test_a_block_that_passes_no_tensor_is_named(ids: Tensor):
    class Odd(Block):
        def forward(self, x: Any) -> Any:
            return x

    block = Odd()
    with pytest.raises(TypeError, match=r"hidden_states\[0\] is a NoneType, expected a tensor"), \
            tap(block, {state(0)}, blocks=[block]) as tapped:  # fmt: skip
        assert isinstance(tapped, Tap)
        block({"x": 1})


def test_an_error_names_the_function_that_was_called():
    for who in ("tap", "attach"):
        with pytest.raises(
            ValueError,
            match=rf"^{who}: blocks is None, expected the transformer "
            r"blocks",
        ):
            Tap(Sites(), [state(1)], who=who)
