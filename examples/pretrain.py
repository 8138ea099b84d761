"""Train one small language model per objective, on the same text from the same start, and compare
them.

    python examples/pretrain.py                                    # "ntp" and "ntp + nitp", about five minutes
    python examples/pretrain.py --data my.txt --objectives "ntp" "ntp + 0.5*nitp(target_layer=2)" --seeds 0 1 2
    python examples/pretrain.py --controls                         # the paper's control arms, as short runs

Each run leaves checkpoint.pt, the checkpoint before it, model.safetensors (the plain model),
steps.csv and validation.csv in a folder of its own under --out; report.html and comparison.png lie
beside them. Ctrl-C, SIGTERM and SIGHUP save the step in hand, a second one stops at once; --resume
goes on. Needs rich, matplotlib and safetensors.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from which `experiments` is imported

from experiments.console.interrupt import until_loaded


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; the exit code."""
    with until_loaded("pretrain"):
        from experiments.comparison import compare
        from experiments.console.command import guarded
        from experiments.train.options import parse
    return guarded("pretrain", lambda: compare(parse(arguments)), resume="--resume")


if __name__ == "__main__":
    sys.exit(main())
