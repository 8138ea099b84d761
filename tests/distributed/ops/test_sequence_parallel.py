"""Two and four gloo processes: rows sharded beside the vocabulary, and the collectives of a pass,
counted."""

from __future__ import annotations

import pytest

from tests.distributed.ops.sequence_parallel_cases import CASES
from tests.support.rank_cases import outcome_of

pytestmark = pytest.mark.ranks


outcome = outcome_of("tests.distributed.ops.sequence_parallel_cases", 2, 4)


@pytest.mark.parametrize("name", CASES)
def test_sharded_rows_train_as_whole_ones(name, outcome):
    assert not outcome[name], outcome[name]
