"""Two gloo processes: attached models that are sharded on the meta device, refilled, or passed too
early."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import tests.distributed.engines.attached_shards_cases as cases
from tests.support.rank_cases import outcome_of

pytestmark = pytest.mark.ranks


found = outcome_of(cases.__name__, 2)


@pytest.mark.parametrize("name", cases.CASES)
def test_case(name: str, found: dict[str, str]):
    assert not found[name], found[name]
