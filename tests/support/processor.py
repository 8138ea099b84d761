"""What the operating system says about this processor: the library's own answer is what the tests
check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

NEEDS = {
    "portable": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"},
}


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields; none where the system has no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


CPU = _cpuinfo()
SETS = tuple(name for name, flags in NEEDS.items() if flags <= set(CPU.get("flags", "").split()))
HAS_OWN_GEMM = "avx2" in SETS and CPU.get("vendor_id") != "GenuineIntel"


def parameters(names: tuple[str, ...]) -> list[Any]:
    """Each instruction set as a parameter, skipped where this processor lacks it."""
    return [
        pytest.param(
            name, marks=pytest.mark.skipif(name not in SETS, reason=f"the processor has no {name}")
        )
        for name in names
    ]
