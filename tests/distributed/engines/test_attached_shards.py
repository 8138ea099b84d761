"""Two gloo processes: attached models that are sharded on the meta device, refilled, or passed too
early."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import tests.distributed.engines.attached_shards_cases as cases
from tests.support import rank_cases

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return rank_cases.results(2, tmp_path_factory.mktemp("ranks"), cases.__name__)


@pytest.mark.parametrize("name", cases.CASES)
def test_case(name: str, found: dict[str, str]):
    assert not found[name], found[name]
