"""Drafting yields the text of plain greedy decoding, and guesses what the heads predict in
training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nitp_ops.engine.base import Context
from nitp_ops.engine.modules.blocks import Block
from nitp_ops.objectives import CompositeObjective, KeyValues, Streams
from tests.engine.draft_cases import INFO, SPECS, Model, Whole, greedy, objective


@pytest.mark.parametrize("spec", SPECS)
@given(
    seed=st.integers(0, 10**6),
    prompt=st.lists(st.integers(0, 4), min_size=1, max_size=9),
    new=st.integers(1, 16),
    limit=st.none() | st.integers(0, 4),
    stop=st.none() | st.integers(0, 4),
)
def test_the_text_is_that_of_greedy_decoding(spec, seed, prompt, new, limit, stop):
    model, ids = Model(seed), torch.tensor([prompt])
    trunk = Whole(model)
    found = objective(spec, seed).draft(trunk, ids, new, max_drafts=limit, stop_token=stop)
    expected = greedy(model, ids, new, stop)
    assert torch.equal(found.token_ids, expected)
    assert found.calls == trunk.calls
    assert found.new_tokens == expected.shape[1] - len(prompt)
    assert all(a <= d for a, d in zip(found.accepted, found.drafted, strict=True))
    if stop is None:
        # each call adds one token beside the accepted drafts
        assert found.calls + sum(found.accepted) == new


@pytest.mark.parametrize("spec", SPECS)
def test_the_trunk_has_read_what_came_true_and_nothing_else(spec):
    model, ids = Model(3), torch.tensor([[1, 2, 3]])
    trunk = Whole(model)
    found = objective(spec).draft(trunk, ids, 12)
    assert trunk.ids is not None
    assert torch.equal(trunk.ids, found.token_ids[:, : trunk.ids.shape[1]])
    assert trunk.ids.shape[1] == found.token_ids.shape[1] - 1


def training_guess(own: CompositeObjective, streams: Streams, part: str, position: int) -> int:
    """The token that the head of a part names at a position, over rows as training declares them."""
    label = str(own.spec.terms[-1].label)
    context = Context(own.info, dict(own.terms.items()).get(label), None, {}, lambda tensor: tensor)
    rows = own.spec.terms[-1].rows(streams, context)[part]  # type: ignore[attr-defined]
    return int(streams.head(rows.hidden[0, position]).argmax())  # type: ignore[operator]


@torch.no_grad()
@pytest.mark.parametrize("spec", [spec for spec in SPECS if "shared" not in spec])
@pytest.mark.parametrize("cuts", [(4, 5, 9), (6, 7, 8), (2, 6, 11)])
def test_a_guess_is_what_the_head_predicts_in_training(spec, cuts):
    """The drafter reads a sequence in three parts; its guesses before each come out wrong, right,
    or a mixture."""
    model, own = Model(7), objective(spec, 5)
    term = own.spec.terms[-1]
    drafter = term.drafter(dict(own.terms.items()).get(str(term.label)), own.info)
    ids = torch.tensor([[0, 1, 2, 3, 4, 0, 2, 4, 1, 3, 0, 1, 2]])
    assert drafter is not None
    start = 0
    for known in cuts:  # hidden states of the first `known` tokens; token `known` is known too
        whole = model(ids[:, :known])
        hidden = getattr(whole, drafter.source)[:, start:]
        drafts = drafter.propose(hidden, ids[:, : known + 1], whole, drafter.reach)
        start = known
        if "sequential" in spec:
            read = torch.cat([ids[:, : known + 1], drafts[None]], dim=1)
            streams = model(read)
            expected = [
                training_guess(own, streams, str(k), known - 1) for k in range(2, len(drafts) + 2)
            ]
        else:
            offsets = sorted(term.offsets)
            # tokens behind, which no state before them sees: a head is read where it has a target
            streams = model(torch.nn.functional.pad(ids[:, : known + 1], (0, max(offsets))))
            places = [
                (min(k for k in offsets if k > ahead), ahead)
                for ahead in range(1, drafter.reach + 1)
            ]
            places = places[: len(drafts)]
            expected = [
                training_guess(own, streams, str(k), known + ahead - k) for k, ahead in places
            ]
        assert drafts.tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("source", ["last_hidden", "last_residual"])
def test_what_stood_on_a_wrong_draft_is_computed_again(source):
    """States and guesses are those of a drafter that reads the same tokens for the first time."""
    model, own = Model(7), objective(f"mtp_sequential(depth=3, source={source})", 5)
    term = own.spec.terms[0]

    def drafter():
        made = term.drafter(dict(own.terms.items())["mtp_sequential"], own.info)
        assert made is not None
        return made

    ids, kept, start = torch.tensor([[0, 1, 2, 3, 4, 0, 2, 4, 1, 3, 0, 1, 2]]), drafter(), 0
    for known in (4, 5, 9, 11):
        whole, anew = model(ids[:, :known]), drafter()
        hidden, tokens = getattr(whole, source), ids[:, : known + 1]
        drafts = kept.propose(hidden[:, start:], tokens, whole, 3)
        assert torch.equal(drafts, anew.propose(hidden, tokens, whole, 3))
        for mine, expected in zip(kept.states, anew.states, strict=True):
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)
        # so that modules 2 and 3 have read tokens that were not accepted
        assert drafts[0] != ids[0, known + 1]
        start = known


def test_every_draft_comes_true_where_the_model_always_says_the_same():
    model = Model(0, bias=True)
    with torch.no_grad():
        assert model.head.bias is not None
        model.head.bias[3] = 100.0
    for spec in ("ntp + mtp_parallel", "ntp + mtp_sequential(depth=3)"):
        found = objective(spec).draft(Whole(model), torch.tensor([[0, 1]]), 10)
        assert found.token_ids.tolist() == [[0, 1, *[3] * 10]]
        assert (found.calls, found.acceptance) == (4, 1.0)  # 1 + 4 + 4 + 1 tokens
        assert found.drafted == (2, 2, 2)  # the last call may add one token only
        assert found.tokens_per_call == 2.5


def test_shared_logits_offer_their_next_most_probable_tokens():
    model = Model(1)
    own = objective("ntp + mtp_shared(offsets=[2, 3])")
    drafter = own.spec.terms[-1].drafter(None, INFO)
    streams = model(torch.tensor([[1, 4, 2]]))
    order = model.head(streams.last_hidden[0, -1]).argsort(descending=True)
    assert (
        drafter.propose(streams.last_hidden, torch.tensor([[1, 4, 2, 0]]), streams, 2).tolist()
        == order[1:3].tolist()
    )


def test_the_models_softcap_scale_and_bias_take_part_in_every_choice():
    # the cap saturates: equal logits, the first of them wins
    info = replace(INFO, softcap=1e-3, logit_scale=1e3)
    model = Model(2, info, bias=True)
    found = objective("ntp + mtp_parallel", info=info).draft(
        Whole(model), torch.tensor([[1, 2]]), 8
    )
    plain = greedy(model, torch.tensor([[1, 2]]), 8)
    ids = torch.tensor([[1, 2]])
    for _ in range(8):
        logits = model.head(model(ids).last_hidden[:, -1:])
        ids = torch.cat([ids, (1e-3 * torch.tanh(logits * 1e3 / 1e-3)).argmax(-1)], dim=1)
    assert torch.equal(found.token_ids, ids) and not torch.equal(ids, plain)


@pytest.mark.parametrize("offsets", ["[2, 3, 4]", "[2, 3]"])
def test_a_factorys_block_drafts_like_a_block_with_keys_and_values(offsets):
    class Plain(Block):
        incremental = False

    own = objective(f"ntp + mtp_parallel(offsets={offsets})")
    other = objective(
        f"ntp + mtp_parallel(offsets={offsets})",
        info=replace(INFO, block_factory=lambda: Plain(INFO)),
    )
    other.load_state_dict(own.state_dict())
    prompt = torch.tensor([[4, 0, 2]])
    one, two = own.draft(Whole(Model(9)), prompt, 20), other.draft(Whole(Model(9)), prompt, 20)
    assert (one.calls, one.drafted, one.accepted) == (two.calls, two.drafted, two.accepted)
    assert torch.equal(one.token_ids, two.token_ids)


@torch.no_grad()
@given(parts=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=5))
def test_attention_with_kept_keys_and_values_is_that_of_the_whole_sequence(parts):
    """Parts of a sequence, each followed by a cut of some positions that then come again."""
    block, past = Block(INFO), KeyValues()
    hidden = torch.randn(1, 24, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole, length = block(hidden, None), 0
    for new, dropped in parts:
        part = block(hidden[:, length : length + new], None, past)
        torch.testing.assert_close(part, whole[:, length : length + new], rtol=1e-12, atol=1e-12)
        length = max(0, length + new - dropped)
        past.cut(length)
        assert past.length == length


@pytest.mark.parametrize(
    ("spec", "change", "error", "message"),
    [
        ("ntp + nitp", {}, ValueError, r"^draft: ntp, nitp can not draft, expected an mtp_\* term "
                                       r"with an offset"),
        ("mtp_parallel(offsets=[1])", {}, ValueError, r"mtp_parallel can not draft"),
        ("ntp + mtp_shared + mtp_sequential", {}, ValueError, r"mtp_shared, mtp_sequential can "
                                                              r"draft, expected label"),
        ("ntp + mtp_shared", {"label": "mtp_shred"}, ValueError, r'one of ntp, mtp_shared. Did '
                                                                 r'you mean "mtp_sh'),
        ("ntp + mtp_shared", {"label": "ntp"}, ValueError, r"^draft: ntp can not draft"),
        ("ntp + mtp_shared", {"new_tokens": 0}, ValueError, r"^draft: new_tokens is 0, expected "
                                                            r"an integer >= 1$"),
        ("ntp + mtp_shared", {"max_drafts": -1}, ValueError, r"^draft: max_drafts is -1, expected "
                                                             r"an integer >= 0$"),
        ("ntp + mtp_shared", {"prompt": torch.tensor([[1], [2]])}, ValueError, r"prompt has shape "
                                                                               r"\(2, 1\)"),
        ("ntp + mtp_shared", {"prompt": torch.tensor([[]]).long()}, ValueError, r"prompt has shape \(1, 0\)"),
        ("ntp + mtp_shared", {"prompt": torch.zeros(1, 3)}, TypeError, r"prompt is torch.float32, "
                                                                       r"expected an int64"),
        ("ntp + mtp_shared", {"prompt": [1, 2]}, TypeError, r"prompt is list, expected an int64"),
    ],
)  # fmt: skip
def test_unfit_arguments_are_refused_by_name(spec, change, error, message):
    given = {"prompt": torch.tensor([[1, 2]]), "new_tokens": 4} | change
    with pytest.raises(error, match=message):
        objective(spec).draft(
            Whole(Model(0)), given.pop("prompt"), given.pop("new_tokens"), **given
        )


def test_a_trunk_that_breaks_its_word_is_refused_by_name():
    class WithoutDrafter(Whole):
        def extend(self, token_ids: Tensor) -> Streams:
            return replace(super().extend(token_ids), embed=None, last_residual=None, head=None)

    class Long(Whole):
        def extend(self, token_ids: Tensor) -> Streams:
            return self.model(torch.cat([token_ids, token_ids], dim=1))

    own = objective("ntp + mtp_sequential(source=last_residual)")
    with pytest.raises(
        ValueError,
        match=r"^draft: the trunk's streams lack last_residual, head, embed, expected "
        r"last_",
    ):
        own.draft(WithoutDrafter(Model(0)), torch.tensor([[1, 2]]), 4)
    with pytest.raises(ValueError, match=r"returned streams of shape \(1, 4\), expected \(1, 2\)"):
        own.draft(Long(Model(0)), torch.tensor([[1, 2]]), 4)
    with pytest.raises(
        TypeError,
        match=r"^draft: trunk.extend returned a Tensor, expected "
        r"Streams$",
    ):
        own.draft(type("Bare", (), {"extend": lambda self, ids: ids})(), torch.tensor([[1, 2]]), 4)
