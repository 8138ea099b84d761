"""Train one small language model per objective, on the same text from the same start, and compare them.

    python examples/pretrain.py                                    # "ntp" and "ntp + nitp", about five minutes
    python examples/pretrain.py --data my.txt --objectives "ntp" "ntp + 0.5*nitp(target_layer=2)" --seeds 0 1 2
    python examples/pretrain.py --controls                         # the paper's control arms, as short runs

Each run leaves checkpoint.pt, the checkpoint before it, model.safetensors (the plain model), steps.csv and
validation.csv in a folder of its own under --out; report.html and comparison.png lie beside them. Ctrl-C, SIGTERM and
SIGHUP save the step in hand, a second one stops at once; --resume goes on. Needs rich, matplotlib and safetensors.
"""

from __future__ import annotations

import sys

from pretraining.interrupt import until_loaded


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; the exit code."""
    with until_loaded("pretrain"):
        from pretraining.command import guarded
        from pretraining.comparison import compare
        from pretraining.options import parse
    return guarded("pretrain", lambda: compare(parse(arguments)), resume="--resume")


if __name__ == "__main__":
    sys.exit(main())
