"""Two and four gloo processes: objectives on a model whose head a tensor-parallel style sharded,
tied, with FSDP2."""

from __future__ import annotations

import pytest

from tests.distributed.objectives.tensor_parallel_cases import CASES
from tests.support.rank_cases import outcome_of

pytestmark = pytest.mark.ranks


outcome = outcome_of("tests.distributed.objectives.tensor_parallel_cases", 2, 4)


@pytest.mark.parametrize("name", CASES)
def test_objectives_train_as_in_one_process(name, outcome):
    assert not outcome[name], outcome[name]
