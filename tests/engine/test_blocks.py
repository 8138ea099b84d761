"""The blocks that objectives own: what they compute, what they see, where their initial values come
from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nitp_ops.engine.modules.blocks import Block, attention_mask, make_block, without_padding
from nitp_ops.objectives import ModelInfo, SpecError, Streams, build
from tests.support.objectives_cases import INFO, make_batch

WIDE = ModelInfo(hidden_size=192, vocab_size=8, num_layers=1)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def slow_block(block: Block, hidden: Tensor, documents: Tensor) -> Tensor:
    """The block on one row [T, d], one position and one attention head at a time."""
    own = dict(block.named_parameters())
    width, size = hidden.shape[1], block.head_size
    normed = torch.stack([rms(x, own["attention_norm.weight"]) for x in hidden])
    query, key, value = (normed @ w.T for w in own["query_key_value.weight"].split(width))
    out = []
    for t in range(len(hidden)):
        seen = [s for s in range(t + 1) if documents[s] == documents[t]]
        heads = []
        for first in range(0, width, size):
            part = slice(first, first + size)
            scores = torch.stack([query[t, part] @ key[s, part] for s in seen]) / size**0.5
            heads.append(scores.softmax(0) @ value[seen][:, part])
        x = hidden[t] + own["output.weight"] @ torch.cat(heads)
        u = rms(x, own["mlp_norm.weight"])
        gate, up = own["gate_up.weight"].chunk(2)
        out.append(x + own["down.weight"] @ (F.silu(gate @ u) * (up @ u)))
    return torch.stack(out)


@pytest.mark.parametrize("packed", [False, True])
def test_the_plain_block_follows_its_equations(packed: bool):
    block = make_block(INFO)
    assert isinstance(block, Block)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    batch = make_batch()
    if packed:
        batch.documents = torch.tensor(
            [[0, 0, 0, 1, 1, -1, -1], [4, 4, 4, 4, 4, 4, 4], [0, 1, 0, 1, 0, 1, -1]]
        )
    mask = attention_mask(batch.streams())
    assert (mask is None) is not packed
    documents = torch.zeros(3, 7) if batch.documents is None else batch.documents
    expected = torch.stack(
        [slow_block(block, *row) for row in zip(batch.hidden, documents, strict=True)]
    )
    torch.testing.assert_close(block(batch.hidden, mask), expected, rtol=1e-11, atol=1e-11)


def test_the_plain_block_has_heads_of_64_and_twelve_square_parameters():
    block = Block(WIDE)
    assert block.head_size == 64 and Block(INFO).head_size == 2
    matrices = sum(p.numel() for p in block.parameters() if p.dim() == 2)
    assert matrices == 12 * 192**2
    values = torch.cat([p.flatten() for p in block.parameters() if p.dim() == 2])
    assert values.std().item() == pytest.approx(0.02, rel=0.02)
    assert all((p == 1).all() for p in block.parameters() if p.dim() == 1)


def test_the_mask_is_causal_inside_documents_and_no_row_of_it_is_empty():
    documents = torch.tensor([[0, 0, 1, 0, -1]])
    mask = attention_mask(Streams(token_ids=torch.zeros(1, 5).long(), document_ids=documents))
    assert mask is not None and mask.shape == (1, 1, 5, 5)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0, 0, 1],
    ]  # fmt: skip


def test_padding_reaches_attention_as_zeros():
    batch = make_batch()
    batch.documents = torch.tensor([[0, 0, 0, 0, 0, -1, -1]] * 3)
    with torch.no_grad():
        batch.hidden[:, 5:] = torch.nan
    clean = without_padding(batch.hidden, batch.streams())
    assert torch.equal(clean[:, :5], batch.hidden[:, :5]) and not clean[:, 5:].any()


class Foreign(nn.Module):
    """A block of someone's model: own initial values, a vector, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.gain = nn.Parameter(torch.full((6,), 0.5))
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.arange(6, dtype=torch.float32), persistent=False)
        self.masks: list[Tensor | None] = []

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        self.masks.append(mask)
        return hidden + self.linear(hidden) * self.gain * self.frequencies


FOREIGN = ModelInfo(
    hidden_size=6,
    vocab_size=11,
    num_layers=5,
    dtype=torch.float64,
    initializer_range=0.5,
    block_factory=Foreign,
)
SPECS = ["mtp_parallel", "mtp_sequential(depth=2)"]


@pytest.mark.parametrize("spec", SPECS)
def test_the_factory_of_the_model_makes_the_blocks_and_keeps_its_initial_values(spec: str):
    state = torch.get_rng_state()
    objective = build(spec, model=FOREIGN, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    blocks = [module for module in objective.modules() if isinstance(module, Foreign)]
    objective(make_batch().streams(document_ids=torch.tensor([[0, 0, 0, 1, 1, 1, -1]] * 3)))
    for block in blocks:
        assert (
            len(block.masks) == 1
            and block.masks[0] is not None
            and block.masks[0].shape == (3, 1, 7, 7)
        )
        assert (block.gain == 0.5).all() and block.gain.dtype == torch.float64
        assert block.frequencies.dtype == torch.float32
    again, other = build(spec, model=FOREIGN, seed=3), build(spec, model=FOREIGN, seed=4)
    own = [module.linear.weight for module in objective.modules() if isinstance(module, Foreign)]
    same = [module.linear.weight for module in again.modules() if isinstance(module, Foreign)]
    different = [module.linear.weight for module in other.modules() if isinstance(module, Foreign)]
    assert all(
        torch.equal(a, b) and not torch.equal(a, c)
        for a, b, c in zip(own, same, different, strict=True)
    )
    assert len({weight.sum().item() for weight in own}) == len(own)


@pytest.mark.parametrize("info", [INFO, FOREIGN], ids=["plain", "foreign"])
@pytest.mark.parametrize("spec", SPECS)
def test_blocks_are_built_on_the_meta_device_and_filled_later(spec: str, info: ModelInfo):
    with torch.device("meta"):
        objective = build(spec, model=info, seed=5)
    assert all(parameter.is_meta for parameter in objective.parameters())
    objective.reset_parameters()
    objective.to_empty(device="cpu").reset_parameters()
    expected = build(spec, model=info, seed=5)
    for mine, wanted in (
        (objective.parameters(), expected.parameters()),
        (objective.buffers(), expected.buffers()),
    ):
        assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))


@pytest.mark.parametrize("spec", SPECS)
def test_the_plain_block_holds_no_linear_module(spec: str):
    assert not any(isinstance(module, nn.Linear) for module in build(spec, model=INFO).modules())


@pytest.mark.parametrize("spec", SPECS)
def test_a_nan_in_own_parameters_under_a_weight_of_zero_reaches_nothing_else(spec: str):
    batch, objective = make_batch(), build(f"ntp + 0*{spec}", model=INFO)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.fill_(torch.nan)
    out = objective(batch.streams())
    out.loss.backward()
    assert torch.equal(out.loss, build("ntp", model=INFO)(batch.streams()).loss)
    assert all(leaf.grad.isfinite().all() for leaf in batch.leaves if leaf.grad is not None)


@pytest.mark.parametrize("spec", SPECS)
def test_narrow_blocks_read_wide_streams_and_the_other_way_round(spec: str):
    batch = make_batch()
    expected = build(spec, model=INFO)(batch.streams()).loss.item()
    single = ModelInfo(hidden_size=6, vocab_size=11, num_layers=5, initializer_range=0.5)
    batch.head.float()
    for dtype in (torch.float32, torch.bfloat16):
        objective = build(spec, model=single).to(dtype)
        for other in (torch.float32, torch.bfloat16):
            hidden = batch.hidden.detach().to(other).requires_grad_()
            loss = objective(
                batch.streams(last_hidden=hidden, last_residual=None, hidden_states={})
            ).loss
            loss.backward()
            assert loss.isfinite() and hidden.grad is not None and hidden.grad.dtype == other
            assert loss.item() == pytest.approx(expected, rel=0.5)


class Wide(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 7)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        return super().forward(hidden)


class Pair(nn.Module):
    def forward(self, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        return hidden, None


def broken() -> nn.Module:
    raise OSError("no such layer")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (Wide, r"made a block that turns (1, 2, 6) into (1, 2, 7), expected (1, 2, 6)"),
        (Pair, r"made a block that returns a tuple, expected a tensor [B, T, d]"),
        (lambda: nn.Linear(6, 6), r"made a block that can not be called as block(hidden, mask): "),
        (lambda: None, r"returned a NoneType, expected an nn.Module"),
        (broken, r"raised OSError: no such layer"),
        ("Block", r"is 'Block', expected a function that makes a block"),
    ],
)
@pytest.mark.parametrize("spec", SPECS)
def test_a_factory_that_makes_no_block_is_refused_at_build_beside_every_other_problem(
    spec, factory, message
):
    with pytest.raises(SpecError) as caught:
        build(f"nitp(target_layer=5) + {spec}", model=replace(FOREIGN, block_factory=factory))
    first, second = caught.value.problems
    assert first.startswith("nitp: target_layer is 5") and second.startswith(
        f"{spec.partition('(')[0]}: block_factory"
    )
    assert message in second
    if spec == "mtp_parallel":
        build("mtp_parallel(heads=residual)", model=replace(FOREIGN, block_factory=factory))


def test_a_block_that_waits_for_its_device_is_not_judged_at_build():
    class Elsewhere(nn.Module):
        def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
            raise RuntimeError("this kernel needs a GPU")

    build("mtp_parallel", model=replace(FOREIGN, block_factory=Elsewhere))
