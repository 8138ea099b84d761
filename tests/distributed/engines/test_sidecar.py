"""What `sidecar_cases` says, of two processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.engines.sidecar_cases import CASES
from tests.support.rank_cases import results

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return results(
        2, Path(tmp_path_factory.mktemp("ranks")), "tests.distributed.engines.sidecar_cases"
    )


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_agree(ran: dict[str, str], case: str):
    assert not ran[case], ran[case]
