"""Two and four gloo processes: rows sharded beside the vocabulary, and the collectives of a pass,
counted."""

from __future__ import annotations

import pytest

from tests.distributed.ops.sequence_parallel_cases import CASES
from tests.support.rank_cases import results

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module", params=[2, 4])
def outcome(request, tmp_path_factory):
    return results(
        request.param,
        tmp_path_factory.mktemp("ranks"),
        "tests.distributed.ops.sequence_parallel_cases",
    )


@pytest.mark.parametrize("name", CASES)
def test_sharded_rows_train_as_whole_ones(name, outcome):
    assert not outcome[name], outcome[name]
