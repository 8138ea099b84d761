"""Decode with the heads that multi-token objectives train: the text of plain greedy decoding, in
fewer calls.

    python examples/draft.py                                       # shared, parallel, sequential heads: a minute each
    python examples/draft.py --objectives "ntp + mtp_parallel(offsets=[2, 3])" --data my.txt
    python examples/draft.py --from runs/pretrain/ntp-mtp_parallel # of examples/pretrain.py --keep-heads

Trains one small model for each objective, exports it with its heads, loads both files again and
decodes held-out text with a cache of keys and values: token by token, then drafted. Needs rich,
matplotlib and safetensors.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from which `experiments` is imported

from experiments.console.interrupt import until_loaded


def main(arguments: list[str] | None = None) -> int:
    """Train, decode, compare; the exit code."""
    with until_loaded("draft"):
        from experiments.console.command import guarded
        from experiments.drafting import demonstrate, parse
    return guarded("draft", lambda: demonstrate(parse(arguments)), resume=None)


if __name__ == "__main__":
    sys.exit(main())
