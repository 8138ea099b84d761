"""What `sidecar_cases` says, of two processes."""

from __future__ import annotations

import pytest

from tests.distributed.engines.sidecar_cases import CASES
from tests.support.rank_cases import outcome_of

pytestmark = pytest.mark.ranks


ran = outcome_of("tests.distributed.engines.sidecar_cases", 2)


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_agree(ran: dict[str, str], case: str):
    assert not ran[case], ran[case]
