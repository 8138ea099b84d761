"""A custom op's schema and arguments are those of the NamedTuples that its function takes."""

import pytest
import torch

from nitp_ops._token_job import Head, Job
from nitp_ops._token_pass import PACKING
from nitp_ops._vocab_shard import VocabShard


def job(**changes):
    rows = torch.zeros(2)
    given = Job(rows, rows.long(), None, rows, None, None, False, 0.1, 0.2, -1, True)
    return given._replace(**changes)


def head(shard):
    weight = torch.zeros(3, 2)
    options = -100, 0.0, 1.0, None, torch.float32, torch.float32, False, True, False
    return Head("op", "native", weight, None, None, *options, shard)


@pytest.mark.parametrize("shard", [None, VocabShard("0", (2, 1), False, True)])
def test_what_is_packed_comes_back(shard):
    jobs = [job(), job(z_loss=0.5, wanted=False)]
    found, of_all = PACKING.unpack(PACKING.pack(jobs, head(shard)))
    assert [each._replace(hidden=0, labels=0, row_weight=0) for each in found] == [
        each._replace(hidden=0, labels=0, row_weight=0) for each in jobs
    ]
    assert all(a.hidden is b.hidden and a.labels is b.labels for a, b in zip(found, jobs, strict=True))
    assert of_all.shard == shard and of_all[3:-1] == head(shard)[3:-1]


def test_every_field_is_an_argument_of_the_op():
    names = [each.name for each in torch.ops.nitp_ops.token_pass.default._schema.arguments]
    of_head = [name for name in Head._fields if name != "shard"]
    of_shard = [f"shard_{name}" for name in VocabShard._fields]
    assert names == [*(f"each_{name}" for name in Job._fields), *of_head, *of_shard, "per_row"]
