"""Whose document a label belongs to: the definition written out position by position, against the
library."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nitp_ops.engine.streams import context_parallel
from nitp_ops.engine.streams.target_window import TargetWindow
from nitp_ops.engine.streams.targets import target_weights, token_targets, valid_pairs
from nitp_ops.objectives import SequenceShard, Streams, available, build
from tests.support.objectives_cases import INFO, Batch, gradients, make_batch

IGNORED = -100
# documents [1, 2, 3] and [5, 6, 7], shifted inside each, then packed
PACKED = {"token_ids": torch.tensor([[1, 2, 5, 6]]), "shift_labels": torch.tensor([[2, 3, 6, 7]])}
BOUNDARIES = {
    "document_ids": torch.tensor([[0, 0, 1, 1]]),
    "position_ids": torch.tensor([[0, 1, 0, 1]]),
    "cu_seqlens": torch.tensor([0, 2, 4], dtype=torch.int32),
    "attention_mask": torch.tensor([[1, 1, 2, 2]]),
}
#: Terms of every kind; `external` brings its own sum.
TERMS = [name for name in available() if name != "external"] + [
    "mtp_parallel(offsets=[2, 3], heads=residual)", "mtp_sequential(depth=2)", "nitp(shift=2, "
                                                                               "mask=document+label)",
]  # fmt: skip


class Case:
    """A row of random streams; P_k and V_k as the definition has them, one position at a time."""

    def __init__(self, fields: dict[str, Tensor], layout: str) -> None:
        self.fields, self.layout, self.doc = fields, layout, fields["document_ids"][0].tolist()
        self.length = len(self.doc)

    def pair(self, t: int, k: int) -> bool:
        return 0 <= t + k < self.length and self.doc[t + k] == self.doc[t] >= 0

    def target(self, t: int, k: int) -> int:
        """x_{t+k} where V_k holds, else IGNORED."""
        masked = self.pair(t, k) and not bool(self.fields["target_mask"][0, t + k])
        if "shift_labels" not in self.fields:
            tokens = self.fields["labels" if "labels" in self.fields else "token_ids"][0]
            return int(tokens[t + k]) if self.pair(t, k) and not masked else IGNORED
        p = t + k - 1
        if not (0 <= p < self.length and self.doc[p] == self.doc[t] >= 0) or masked:
            return IGNORED
        if self.layout == "stream" and t + k < self.length and not self.pair(t, k):
            return IGNORED
        return int(self.fields["shift_labels"][0, p])

    def weight(self, t: int, k: int) -> float:
        return float(self.fields["token_weight"][0, t + k]) if self.pair(t, k) else 1.0

    def nearest(self, t: int, window: int) -> list[int]:
        seen, found = {IGNORED}, []
        for k in range(1, window + 1):
            x = self.target(t, k)
            found.append(IGNORED if x in seen else x)
            seen.add(x)
        return found


@st.composite
def cases(
    draw, contiguous: bool = False, kinds: tuple[str, ...] = ("token_ids", "labels", "shift_labels")
) -> Case:
    shape = (1, draw(st.sampled_from([4, 8])))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    doc = torch.randint(-1, 3, shape, generator=seed)
    if contiguous:  # a new document wherever the number says so
        doc = (doc == 2).cumsum(1)
    tokens = torch.randint(INFO.vocab_size, shape, generator=seed)
    fields = {"token_ids": tokens, "document_ids": doc}
    kind = draw(st.sampled_from(kinds))
    if kind != "token_ids":
        labels = torch.randint(INFO.vocab_size, shape, generator=seed)
        fields[kind] = labels.masked_fill(torch.rand(shape, generator=seed) < 0.2, IGNORED)
    fields["target_mask"] = torch.rand(shape, generator=seed) < 0.6
    fields["token_weight"] = torch.rand(shape, generator=seed, dtype=torch.float64)
    return Case(fields, draw(st.sampled_from(["document", "stream"])))


@settings(deadline=None, max_examples=60)
@given(case=cases(), k=st.integers(0, 13))
def test_targets_pairs_and_weights_follow_the_definition(case: Case, k: int):
    whole = range(case.length)
    expected = torch.tensor([[case.target(t, k) for t in whole]])
    pairs = torch.tensor([[case.pair(t, k) for t in whole]])
    weights = torch.tensor([[case.weight(t, k) for t in whole]], dtype=torch.float64)
    window = max(1, min(k, case.length))
    nearest = torch.tensor([[case.nearest(t, window) for t in whole]])
    of_window = torch.tensor(
        [[[case.weight(t, j) for j in range(1, window + 1)] for t in whole]], dtype=torch.float64
    )
    for streams in parts(case):
        assert torch.equal(token_targets(streams, k), streams.here(expected))
        assert torch.equal(valid_pairs(streams, k), streams.here(pairs))
        labelled = pairs & (expected != IGNORED)
        assert torch.equal(valid_pairs(streams, k, labelled=True), streams.here(labelled))
        weight = target_weights(streams, k)
        assert weight is not None and torch.equal(weight, streams.here(weights))
        window_is(
            TargetWindow(streams, 1, window),
            streams.here(nearest).flatten(0, 1),
            streams.here(of_window).flatten(0, 1),
        )


def window_is(window: TargetWindow, nearest: Tensor, weights: Tensor) -> None:
    """The targets at their k, [rows, window], and the weights of those."""
    assert torch.equal(window.occupied(), (nearest != IGNORED).any(-1))
    labels, k = window.targets(slice(None), nearest.shape[1])
    row, column = (labels != IGNORED).nonzero(as_tuple=True)
    found = torch.full_like(nearest, IGNORED)
    found[row, k[row, column] - 1] = labels[row, column]
    assert torch.equal(found, nearest)
    of_window = window.weights(k)
    assert of_window is not None
    assert torch.equal(of_window[row, column], weights[row, k[row, column] - 1])


def parts(case: Case) -> list[Streams]:
    """The whole row, and what each of two ranks holds of it in either layout of context parallel."""
    fields = {"label_layout": case.layout, **case.fields}
    found = [Streams(**fields)]
    for layout in ("contiguous", "zigzag"):
        for rank in range(2):
            with mock.patch.object(
                context_parallel, "group_size", lambda group, rank=rank: (2, rank)
            ):
                found.append(
                    Streams(**fields, shard=SequenceShard(length=case.length, layout=layout))
                )
    return found


@pytest.mark.parametrize("source", BOUNDARIES)
def test_each_documents_last_label_is_a_target(source: str):
    streams = {**PACKED, source: BOUNDARIES[source]}
    objective = build("ntp + 0.3*mtp_shared(offsets=[2])", model=INFO)
    batch = make_batch(batch=1, length=4)
    given = batch.streams(**streams)
    counts = objective.count(given)
    assert {name: n.item() for name, n in counts.items()} == {"ntp": 4, "mtp_shared/2": 2}
    apart = [
        batch.part(slice(None)).streams(
            token_ids=PACKED["token_ids"][:, row], shift_labels=PACKED["shift_labels"][:, row],
            last_hidden=batch.hidden[:, row], last_residual=None, hidden_states={},
        )
        for row in (slice(0, 2), slice(2, 4))
    ]  # fmt: skip
    rows = [objective.count(each) for each in apart]
    assert rows[0] + rows[1] == counts
    loss = torch.stack([objective(each, counts=counts).loss for each in apart]).sum()
    same(objective(given).loss, loss, batch.leaves)
    plain = F.cross_entropy(batch.head(batch.hidden)[0], PACKED["shift_labels"][0])
    same(build("ntp", model=INFO)(given).loss, plain, batch.leaves)


def same(found: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    for mine, other in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def cut_into_documents(batch: Batch, fields: dict[str, Tensor]) -> list[Streams]:
    """Every document as a row of its own, connected to the same leaves."""
    doc, found = fields["document_ids"][0], []
    for number in doc.unique().tolist():
        begin, end = (doc == number).nonzero().flatten()[[0, -1]].tolist()
        at = slice(begin, end + 1)
        hidden = {k: state[:, at] for k, state in batch.states.items()}
        own = {name: value[:, at] for name, value in fields.items() if name != "document_ids"}
        residual = batch.residual[:, at]
        found.append(
            batch.streams(
                **own, last_hidden=batch.hidden[:, at], last_residual=residual, hidden_states=hidden
            )
        )
    return found


@pytest.mark.parametrize("term", TERMS)
@settings(deadline=None, max_examples=2)
@given(case=cases(contiguous=True, kinds=("shift_labels", "labels")))
def test_packed_documents_train_like_rows_of_their_own(term: str, case: Case):
    batch, objective = make_batch(batch=1, length=case.length), build(term, model=INFO)
    packed, apart = batch.streams(**case.fields), cut_into_documents(batch, case.fields)
    counts = sum((objective.count(each) for each in apart[1:]), start=objective.count(apart[0]))
    assert counts == objective.count(packed)
    loss = torch.stack([objective(each, counts=counts).loss for each in apart]).sum()
    same(objective(packed).loss, loss, [*batch.leaves, *objective.parameters()])


@pytest.mark.parametrize("term", TERMS)
@settings(deadline=None, max_examples=2)
@given(case=cases(contiguous=True, kinds=("labels",)))
def test_labels_that_were_shifted_as_a_stream_train_like_the_labels(term: str, case: Case):
    batch, objective = make_batch(batch=1, length=case.length), build(term, model=INFO)
    fields = {name: value for name, value in case.fields.items() if name != "labels"}
    labels = case.fields["labels"]
    shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    plain = batch.streams(**fields, labels=labels)
    stream = batch.streams(**fields, shift_labels=shifted, label_layout="stream")
    assert objective.count(stream) == objective.count(plain)
    same(objective(stream).loss, objective(plain).loss, [*batch.leaves, *objective.parameters()])


@pytest.mark.parametrize("kind", ["labels", "shift_labels"])
@pytest.mark.parametrize(
    "document_ids", [[0, 0, 0, 1, 1, 1, -1], [0, 1, 0, 1, 0, 0, -1]], ids=["runs", "mixed"]
)
def test_a_token_outside_the_document_reaches_no_sequential_module(
    document_ids: list[int], kind: str
):
    """Row t of depth k reads x_{t+k}: where that token is another document's, its id changes
    nothing, valid or not."""
    objective = build("mtp_sequential(depth=2)", model=INFO)
    labels, documents = make_batch(batch=1).ids, torch.tensor([document_ids])
    outcomes = []
    for foreign in (0, 7, -100):
        batch = make_batch(batch=1)
        used = [valid_pairs(Streams(token_ids=labels, document_ids=documents), k) for k in (1, 2)]
        read = torch.zeros_like(used[0])
        for k, valid in enumerate(used, start=1):
            read[:, k:] |= valid[:, :-k]
        ids = torch.where(read, batch.ids, foreign)
        streams = batch.streams(token_ids=ids, document_ids=documents, **{kind: labels})
        loss = objective(streams).loss
        outcomes.append([*objective.count(streams).values(), loss, *gradients(loss, batch.leaves)])
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


def test_another_layout_is_refused_and_labels_that_are_not_shifted_have_none():
    for wrong, shown in (("documents", '"documents"'), (None, "None"), (True, "True")):
        with pytest.raises(
            ValueError,
            match=f'^Streams: label_layout is {shown}, expected "document" or "stream"$',
        ):
            Streams(**PACKED, label_layout=wrong)  # type: ignore[arg-type]
    labels = {"labels": PACKED["token_ids"], "document_ids": BOUNDARIES["document_ids"]}
    for k in range(3):
        plain, stream = (
            token_targets(Streams(**labels, label_layout=x), k) for x in ("document", "stream")
        )  # type: ignore[arg-type]
        assert torch.equal(plain, stream)
