"""What an attached model reads from a batch: whose document a pre-shifted label belongs to, and
keys that hold None."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from torch import Tensor

import nitp_ops
from tests.support.hugging_face_cases import batch, gradients, make

pytestmark = pytest.mark.trainers
SPEC = "ntp + 0.3*mtp_shared(offsets=[2]) + 0.8*nitp(target_layer=1)"
LENGTHS = torch.tensor([0, 4, 7, 10], dtype=torch.int32)
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]])


def packed() -> dict[str, Tensor]:
    """Three documents in a row of ten; every token is a label."""
    ids = batch(rows=1)["input_ids"]
    return {"input_ids": ids, "labels": ids, "position_ids": POSITIONS}


def with_shifted(given: dict[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """The labels shifted over the whole row, as trainers do it under context parallel."""
    shifted = F.pad(given["labels"], (0, 1), value=-100)[:, 1:]
    rest = given if keep else {name: value for name, value in given.items() if name != "labels"}
    return rest | {"shift_labels": shifted}


def counts(handle: Any, given: dict[str, Any]) -> dict[str, int]:
    return {part: int(n) for part, n in handle.count(given).items()}


@pytest.mark.parametrize("keep", [True, False], ids=["beside labels", "alone"])
def test_shift_labels_of_a_stream_train_like_the_labels_that_they_were_made_of(keep: bool):
    model = make("llama")
    handle, given = nitp_ops.attach(model, SPEC, label_layout="stream"), packed()
    shifted = with_shifted(given, keep=keep)
    assert (
        counts(handle, given) == counts(handle, shifted) == {"ntp": 7, "mtp_shared/2": 4, "nitp": 7}
    )
    expected, found = (gradients(model(**each).loss, model) for each in (given, shifted))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("source", ["position_ids", "cu_seqlens"])
def test_shift_labels_of_documents_are_all_targets_and_ntp_is_their_cross_entropy(source: str):
    plain, model = make("llama"), make("llama")
    handle = nitp_ops.attach(model, "ntp + 0*mtp_shared(offsets=[2])")
    given: dict[str, Any] = with_shifted(packed(), keep=False)
    given["shift_labels"] = torch.randint(64, (1, 10), generator=torch.Generator().manual_seed(3))
    if source == "cu_seqlens":
        given |= {
            "cu_seq_lens_q": LENGTHS,
            "cu_seq_lens_k": LENGTHS,
            "max_length_q": 4,
            "max_length_k": 4,
        }
    assert counts(handle, given) == {"ntp": 10, "mtp_shared/2": 7}
    logits = plain(input_ids=given["input_ids"], position_ids=POSITIONS, use_cache=False).logits
    expected = F.cross_entropy(logits[0], given["shift_labels"][0])
    torch.testing.assert_close(model(**given).loss, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("present", ["cu_seqlens", "cu_seq_lens_q"])
@pytest.mark.parametrize(
    "absent", [True, False], ids=["the other is None", "the other is not there"]
)
def test_boundaries_come_from_either_name_of_cu_seqlens(present: str, absent: bool):
    ids = torch.arange(3, 11)[None]
    given: dict[str, Any] = {
        "input_ids": ids,
        "labels": ids,
        present: torch.tensor([0, 4, 8], dtype=torch.int32),
    }
    if absent:
        given |= dict.fromkeys(
            {"cu_seqlens", "cu_seq_lens_q", "position_ids", "attention_mask"} - {present}
        )
    handle = nitp_ops.attach(make("llama"), "ntp")
    assert counts(handle, given) == {"ntp": 6}


def test_a_key_that_holds_none_is_absent():
    model = make("llama")
    handle, given = nitp_ops.attach(model, SPEC), packed()
    expected, before = model(**given), counts(handle, given)
    found = model(**given, shift_labels=None, cu_seq_lens_q=None, use_cache=None, return_dict=None)
    assert torch.equal(found.loss, expected.loss) and found.past_key_values is None
    by_position = {
        "cu_seqlens": None,
        "cu_seq_lens_q": None,
        "shift_labels": None,
        "attention_mask": None,
    }
    assert counts(handle, given | by_position) == before


def test_router_logits_that_the_caller_left_out_are_returned_where_the_objective_needs_them():
    model = make("mixtral")
    nitp_ops.attach(model, "ntp + aux_loss: 0.02*external")
    expected = model(**batch()).loss
    assert torch.equal(model(**batch(), output_router_logits=None).loss, expected)


def test_another_layout_is_refused_at_attach():
    with pytest.raises(
        ValueError,
        match=r'^attach: label_layout is "packed", expected "document" '
        r'or "stream"$',
    ):
        nitp_ops.attach(make("llama"), "ntp", label_layout="packed")  # type: ignore[arg-type]
