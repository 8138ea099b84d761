"""Train "ntp", "ntp + nitp" and "ntp + mtp_parallel" on two texts, with equal tokens and with equal
time; write docs/evidence.md.

    python experiments/evidence.py                       # under fifteen minutes on two cores
    python experiments/evidence.py --texts a.txt books/  # other texts; "-" is the sources of Python's library
    python experiments/evidence.py --write-only          # write the page again from what is measured

Every finished run is a line in records.jsonl under --out: the same command continues after a stop
and trains nothing twice. Other settings want another --out. Needs rich, matplotlib and safetensors.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from which `experiments` is imported

from experiments.console.interrupt import until_loaded


def main(arguments: list[str] | None = None) -> int:
    """Run the arms; the exit code."""
    with until_loaded("evidence"):
        from experiments.console.command import guarded
        from experiments.equal_budgets import gather, parse
    return guarded("evidence", lambda: gather(parse(arguments)), resume=None)


if __name__ == "__main__":
    sys.exit(main())
