"""Which targets exist k steps ahead: the traps of shifting, masking and packing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nitp_ops.engine.streams.targets import target_weights, token_targets, valid_pairs
from nitp_ops.objectives import ModelInfo, Streams, build
from tests.support.objectives_cases import INFO, assert_same, make_batch, ntp_sum, pairs

IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])


def ids_streams(**changes: object) -> Streams:
    return Streams(**{"token_ids": IDS, **changes})  # type: ignore[arg-type]


def test_unshifted_labels_are_shifted_once():
    plain = token_targets(ids_streams(), 1)
    assert plain.tolist() == [[1, 4, 1, 5, 9, -100]]
    assert torch.equal(token_targets(ids_streams(labels=IDS), 1), plain)


def test_shifted_labels_are_not_shifted_again():
    row = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
    streams = Streams(token_ids=row[:, :-1], shift_labels=row[:, 1:])
    assert token_targets(streams, 1).tolist() == [[1, 4, 1, 5, 9, 2]]
    assert token_targets(streams, 2).tolist() == [[4, 1, 5, 9, 2, -100]]


def test_a_pre_shifted_row_has_one_ntp_target_more_than_nitp_pairs():
    batch = make_batch()
    objective = build("ntp + nitp", model=INFO)
    streams = batch.streams(shift_labels=torch.ones(3, 7, dtype=torch.int64))
    assert {name: n.item() for name, n in objective.count(streams).items()} == {
        "ntp": 21,
        "nitp": 18,
    }
    unshifted = batch.streams(labels=torch.ones(3, 7, dtype=torch.int64))
    assert {name: n.item() for name, n in objective.count(unshifted).items()} == {
        "ntp": 18,
        "nitp": 18,
    }


def test_pre_shifted_labels_give_the_loss_of_the_longer_row():
    batch = make_batch(length=8)
    objective = build("ntp", model=INFO)
    whole = objective(batch.streams()).loss
    shorter = Streams(
        shift_labels=batch.ids[:, 1:],
        token_ids=batch.ids[:, :-1],
        last_hidden=batch.hidden[:, :-1],
        head=batch.head,
    )
    assert_same(objective(shorter).loss, whole, batch.leaves)


def test_both_kinds_of_labels_are_refused():
    with pytest.raises(
        ValueError, match="labels and shift_labels are both given, expected at most one"
    ):
        ids_streams(labels=IDS, shift_labels=IDS)


def test_the_mask_belongs_to_the_target_and_not_to_its_predictor():
    mask = torch.tensor([[True, True, False, True, True, True]])
    assert token_targets(ids_streams(target_mask=mask), 1).tolist() == [[1, -100, 1, 5, 9, -100]]
    labels = IDS.masked_fill(~mask, -100)
    assert token_targets(ids_streams(labels=labels), 1).tolist() == [[1, -100, 1, 5, 9, -100]]


def test_a_masked_label_stays_the_input_of_its_successor():
    labels = torch.tensor([[-100, -100, -100, 1, 5, 9]])
    assert token_targets(ids_streams(labels=labels), 1).tolist() == [[-100, -100, 1, 5, 9, -100]]


def test_targets_do_not_cross_documents():
    streams = ids_streams(document_ids=torch.tensor([[0, 0, 1, 1, 1, -1]]))
    assert token_targets(streams, 1).tolist() == [[1, -100, 1, 5, -100, -100]]
    assert token_targets(streams, 2).tolist() == [[-100, -100, 5, -100, -100, -100]]
    assert valid_pairs(streams, 0).tolist() == [[True] * 5 + [False]]


def test_targets_do_not_wrap_around_at_any_distance():
    for k in range(1, 9):
        targets = token_targets(ids_streams(), k)
        assert (targets[:, max(0, 6 - k) :] == -100).all()
        assert not valid_pairs(ids_streams(), k)[:, max(0, 6 - k) :].any()


def test_a_pre_shifted_target_belongs_to_the_document_in_which_it_stands():
    streams: dict[str, Any] = {
        "shift_labels": IDS,
        "document_ids": torch.tensor([[0, 0, 0, 0, 0, 1]]),
    }
    inside, whole = Streams(**streams), Streams(**streams, label_layout="stream")
    assert token_targets(inside, 1).tolist() == [[3, 1, 4, 1, 5, 9]]
    assert token_targets(inside, 2).tolist() == [[1, 4, 1, 5, -100, -100]]
    # the fifth label is the first token of the other document where the whole row was shifted
    assert token_targets(whole, 1).tolist() == [[3, 1, 4, 1, -100, 9]]
    assert token_targets(whole, 2).tolist() == [[1, 4, 1, -100, -100, -100]]


def test_nothing_is_known_of_the_token_after_a_documents_last_label():
    boundary = {"shift_labels": IDS, "document_ids": torch.tensor([[0, 0, 0, 1, 1, 1]])}
    mask, weight = (
        torch.tensor([[True, True, False, False, True, False]]),
        torch.tensor([[2.0, 3, 4, 5, 6, 7]]),
    )
    streams = Streams(**boundary, target_mask=mask, token_weight=weight)
    assert token_targets(streams, 1).tolist() == [[3, -100, 4, 1, -100, 9]]
    assert target_weights(streams, 1).tolist() == [[3, 4, 1, 6, 7, 1]]  # type: ignore[union-attr]


def test_a_masked_pre_shifted_label_masks_its_hidden_target_too():
    streams = Streams(shift_labels=torch.tensor([[1, -100, 1, 5, 9, 2]]))
    assert valid_pairs(streams, 1, labelled=True).tolist() == [
        [True, False, True, True, True, False]
    ]
    assert valid_pairs(streams, 1).tolist() == [[True] * 5 + [False]]


def test_position_ids_attention_mask_and_cu_seqlens_give_the_same_documents():
    expected = valid_pairs(ids_streams(document_ids=torch.tensor([[0, 0, 1, 1, 1, -1]])), 1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    for source in (
        {"position_ids": torch.tensor([[0, 1, 0, 1, 2, 3]]), "attention_mask": mask},
        {"cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32)},
        {"attention_mask": torch.tensor([[1, 1, 2, 2, 2, 0]])},
        {"attention_mask": mask.bool(), "cu_seqlens": torch.tensor([0, 2, 5, 6])},
    ):
        assert torch.equal(valid_pairs(ids_streams(**source), 1), expected), source


def test_padding_is_neither_predictor_nor_target():
    streams = ids_streams(attention_mask=torch.tensor([[0, 0, 1, 1, 0, 0]]))
    assert token_targets(streams, 1).tolist() == [[-100, -100, 1, -100, -100, -100]]
    assert valid_pairs(streams, 1).tolist() == [[False, False, True, False, False, False]]


def test_cu_seqlens_count_through_the_rows_of_a_batch():
    streams = Streams(
        token_ids=torch.ones(2, 3, dtype=torch.int64), cu_seqlens=torch.tensor([0, 2, 5])
    )
    assert streams.documents is not None
    assert streams.documents.tolist() == [[0, 0, 1], [1, 1, -1]]


@pytest.mark.parametrize(
    "sources",
    [
        {"document_ids": [[0, 0, 1, 1, 1, 1]], "position_ids": [[0, 1, 2, 0, 1, 2]]},
        {"document_ids": [[0, 0, 1, 1, 1, 1]], "cu_seqlens": [0, 3, 6]},
        {"position_ids": [[0, 1, 0, 1, 2, 3]], "cu_seqlens": [0, 3, 6]},
        {"document_ids": [[0, 0, 0, 0, 0, 0]], "attention_mask": [[1, 1, 1, 1, 1, 0]]},
        {"document_ids": [[0, 0, 0, 0, 0, -1]], "attention_mask": [[1, 1, 1, 1, 1, 1]]},
    ],
    ids=str,
)
def test_document_sources_that_disagree_are_refused(sources: dict):
    with pytest.raises(ValueError, match="disagrees with"):
        ids_streams(**{name: torch.tensor(value) for name, value in sources.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": IDS[:, 1:]}, r"labels has shape \(1, 5\), expected \(1, 6\)"),
        ({"labels": IDS.float()}, "labels is torch.float32, expected an integer dtype"),
        ({"target_mask": IDS}, "target_mask is torch.int64, expected torch.bool"),
        (
            {"attention_mask": torch.ones(1, 6)},
            "attention_mask is torch.float32, expected bool or an integer",
        ),
        ({"attention_mask": torch.ones(1, 1, 6, 6).long()}, "attention_mask has shape"),
        ({"cu_seqlens": torch.ones(1, 3).long()}, "cu_seqlens has shape"),
        ({"last_hidden": torch.ones(1, 5, 4)}, r"last_hidden has shape \(1, 5, 4\), expected"),
        (
            {"hidden_states": {2: torch.ones(6, 4)}},
            r"hidden_states\[2\] has shape \(6, 4\), "
            r"expected",
        ),
        ({"hidden_states": [torch.ones(1, 6, 4)]}, "hidden_states is a list, expected a mapping"),
        ({"token_ids": None}, "token_ids, labels and shift_labels are all missing"),
        ({"token_weight": IDS}, "token_weight is torch.int64, expected a floating point"),
        ({"ignore_index": None}, "ignore_index is None, expected an integer"),
    ],
    ids=str,
)
def test_unfit_streams_are_refused_by_name(changes: dict, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        ids_streams(**changes)


@settings(deadline=None, max_examples=40)
@given(
    documents=st.lists(
        st.lists(st.integers(-1, 2), min_size=7, max_size=7), min_size=3, max_size=3
    ),
    mask=st.lists(st.booleans(), min_size=21, max_size=21),
    k=st.integers(1, 8),
)
def test_valid_targets_follow_the_definition(documents: list[list[int]], mask: list[bool], k: int):
    batch = make_batch()
    batch.documents = torch.tensor(documents)
    ok = torch.tensor(mask).view(3, 7)
    targets = token_targets(batch.streams(target_mask=ok), k)
    expected = torch.full((3, 7), -100)
    for b, t in pairs(batch, k, ok):
        expected[b, t] = batch.ids[b, t + k]
    assert torch.equal(targets, expected)
    assert valid_pairs(batch.streams(), k).nonzero().tolist() == [
        list(pair) for pair in pairs(batch, k)
    ]


def test_packed_documents_train_like_separate_rows():
    batch = make_batch(batch=1, length=6)
    batch.documents = torch.tensor([[0, 0, 1, 1, 1, -1]])
    positions = pairs(batch, 1)
    assert positions == [(0, 0), (0, 2), (0, 3)]
    loss = build("ntp", model=INFO)(batch.streams()).loss
    assert_same(loss, ntp_sum(batch, positions) / 3, batch.leaves)
    separate = [
        F.cross_entropy(batch.head(batch.hidden[0, t]), batch.ids[0, t + 1]) for _, t in positions
    ]
    torch.testing.assert_close(loss, torch.stack(separate).mean())


@pytest.mark.parametrize("name", ["token_ids", "labels", "shift_labels"])
@pytest.mark.parametrize("wrong", [-1, 11])
@pytest.mark.parametrize(
    "spec", ["ntp", "ntp + mtp_shared(offsets=[2])", "top", "mtp_parallel", "fsp_bow"]
)
def test_a_target_outside_the_vocabulary_is_named_as_it_was_given(spec: str, wrong: int, name: str):
    info = ModelInfo(hidden_size=6, vocab_size=11, num_layers=5)
    tokens = torch.zeros(2, 7, dtype=torch.int64)
    streams = {
        "token_ids": tokens,
        "last_hidden": torch.zeros(2, 7, 6),
        "head": nn.Linear(6, 11, bias=False),
    }
    objective = build(spec, model=info)
    objective(
        Streams(
            **streams
            | {name: tokens.index_put((torch.tensor(0), torch.tensor(3)), torch.tensor(-100))}
        )
    )
    tokens = tokens.index_put((torch.tensor(1), torch.tensor(4)), torch.tensor(wrong))
    with pytest.raises(
        IndexError,
        match=rf"^objective: {name}\[1, 4\] is {wrong}, expected a "
        r"value in \[0, 11\) or",
    ):
        objective(Streams(**streams | {name: tokens}))
    unmasked = (tokens == 0).roll(int(name == "shift_labels"), 1)
    objective(Streams(**streams | {name: tokens, "target_mask": unmasked}))


def test_a_token_that_nothing_predicts_may_be_anything():
    info = ModelInfo(hidden_size=6, vocab_size=11, num_layers=5)
    streams = Streams(
        token_ids=torch.tensor([[99, 1, 2, 99, 3]]),
        document_ids=torch.tensor([[0, 0, 0, 1, 1]]),
        last_hidden=torch.zeros(1, 5, 6),
        head=nn.Linear(6, 11, bias=False),
    )
    assert build("ntp", model=info)(streams).loss.isfinite()
    streams = Streams(token_ids=torch.tensor([[1, 99, 2]]), last_hidden=torch.ones(1, 3, 6))
    assert build("cosine_regularizer", model=info)(streams).loss.isfinite()
