"""Measure the paper's control arms and the whole-step overhead on real text, and write
docs/experiments.md.

    python experiments/ablations.py                                 # everything, with the budget that --help names
    python experiments/ablations.py --experiments overhead         # one of them; the document keeps what is measured
    python experiments/ablations.py --experiments                  # write the document again from the records

Every finished measurement is a line in records.jsonl under --out: the same command continues after
a stop and measures nothing twice. Other settings want another --out. Needs rich, matplotlib and
safetensors.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from which `experiments` is imported

from experiments.console.interrupt import until_loaded


def main(arguments: list[str] | None = None) -> int:
    """Run the experiments; the exit code."""
    with until_loaded("ablations"):
        from experiments.console.command import guarded
        from experiments.experiment import experiment, parse
    return guarded("ablations", lambda: experiment(parse(arguments)), resume=None)


if __name__ == "__main__":
    sys.exit(main())
