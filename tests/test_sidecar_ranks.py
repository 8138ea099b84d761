"""What `sidecar_cases` says, of two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_cases import results
from sidecar_cases import CASES

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return results(2, Path(tmp_path_factory.mktemp("ranks")), "sidecar_cases")


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_agree(ran: dict[str, str], case: str):
    assert not ran[case], ran[case]
