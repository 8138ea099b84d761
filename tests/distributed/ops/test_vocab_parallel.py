"""Two and four gloo processes: a head whose vocabulary is sharded gives what one process gives,
option by option."""

from __future__ import annotations

import pytest

from tests.distributed.ops.vocab_parallel_cases import CASES
from tests.support.rank_cases import outcome_of

pytestmark = pytest.mark.ranks


outcome = outcome_of("tests.distributed.ops.vocab_parallel_cases", 2, 4)


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_head_is_the_whole_head(name, outcome):
    assert not outcome[name], outcome[name]
