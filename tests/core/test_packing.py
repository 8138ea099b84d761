"""A custom op's schema and arguments are those of the types that its function takes."""

import pytest
import torch

from nitp_ops import CrossEntropyTerm
from nitp_ops.core.packing import names_of
from nitp_ops.ops.cross_entropy.autograd import PACKING
from nitp_ops.ops.cross_entropy.chunked import Call
from nitp_ops.ops.cross_entropy.term import Unembedding
from nitp_ops.ops.cross_entropy.vocab_shard import VocabShard


def unembedding(shard):
    return Unembedding("op", torch.zeros(3, 2), None, -100, 0.0, 1.0, None, None, shard)


CALL = Call(
    "native",
    torch.float32,
    torch.bfloat16,
    "mean",
    torch.tensor(3.0),
    True,
    False,
    (True, False),
    True,
    False,
)


@pytest.mark.parametrize("shard", [None, VocabShard("0", (2, 1), False, True)])
def test_what_is_packed_comes_back(shard):
    rows = torch.zeros(2, 2)
    terms = [
        CrossEntropyTerm(rows, rows[0].long(), z_loss=z, max_rows=most)
        for z, most in ((0.0, None), (0.5, 3))
    ]
    found, head, call = PACKING.unpack(PACKING.pack(terms, unembedding(shard), CALL))
    for ours, term in zip(found, terms, strict=True):
        assert all(
            getattr(ours, name) is getattr(term, name)
            for name in ("hidden", "labels", "token_weight")
        )
        assert (ours.z_loss, ours.max_rows, ours.label_smoothing) == (
            term.z_loss,
            term.max_rows,
            0.0,
        )
    assert head[2:] == unembedding(shard)[2:] and head.op == "op"
    assert call == CALL


def test_every_field_is_an_argument_of_the_op():
    names = [each.name for each in torch.ops.nitp_ops.token_pass.default._schema.arguments]
    of_head = [name for name in Unembedding._fields if name != "shard"]
    of_shard = [f"shard_{name}" for name in VocabShard._fields]
    of_terms = [f"each_{name}" for name in names_of(CrossEntropyTerm)]
    assert names == [*of_terms, *of_head, *of_shard, *Call._fields]
    assert [PACKING.index_of(name) for name in ("hidden", "weight", "backend")] == [
        names.index(name) for name in ("each_hidden", "weight", "backend")
    ]
