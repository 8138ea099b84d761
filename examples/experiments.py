"""Measure the paper's control arms and the whole-step overhead on real text, and write docs/experiments.md.

    python examples/experiments.py                                 # everything, with the budget that --help names
    python examples/experiments.py --studies overhead              # one study; the document keeps what is measured
    python examples/experiments.py --studies                       # write the document again from the records

Every finished measurement is a line in records.jsonl under --out: the same command continues after a stop and
measures nothing twice. Other settings want another --out. Needs rich, matplotlib and safetensors.
"""

from __future__ import annotations

import sys

from pretraining.interrupt import until_loaded


def main(arguments: list[str] | None = None) -> int:
    """Run the experiments; the exit code."""
    with until_loaded("experiments"):
        from pretraining.command import guarded
        from pretraining.study import experiment, parse
    return guarded("experiments", lambda: experiment(parse(arguments)), resume=None)


if __name__ == "__main__":
    sys.exit(main())
