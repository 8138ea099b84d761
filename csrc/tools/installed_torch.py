"""python csrc/tools/installed_torch.py: this environment's torch as a constraint for pip, so that
it stays as it is."""

from __future__ import annotations

import sys
from importlib import metadata

OLDEST = (2, 11)


def main() -> int:
    version = metadata.version("torch")
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        print(
            f"make: {sys.prefix} is active and has torch {version}, nitp_ops needs torch >= "
            f"{oldest}: upgrade torch there, or deactivate the environment and make uses .venv",
            file=sys.stderr,
        )
        return 1
    print(f"torch=={version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
