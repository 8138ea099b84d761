"""What the adapters require of the packages that they adapt to, and what they offer to an objective."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import metadata

from nitp_ops.engine.streams.needs import named
from nitp_ops.objectives import Need

STREAMS = ("token_ids", "last_hidden", "last_residual", "hidden_states", "head", "embed")


def check_version(package: str, lowest: str, below: str) -> None:
    """Refuse a package that is absent or outside ``lowest <= version < below``.

    Raises:
        ImportError: names the package, what is installed and what was expected.
    """
    expected = f"expected {package}>={lowest},<{below}"
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{package} is not installed, {expected}") from None
    if not _numbers(lowest) <= _numbers(found) < _numbers(below):
        raise ImportError(f"{package} is {found}, {expected}")


def check_streams(
    adapter: str, requires: Iterable[Need], provided: Iterable[str] = STREAMS
) -> None:
    """Refuse an objective that requires streams which an adapter does not provide, before any step.

    A provided "hidden_states" stands for all of them, "external[aux_loss]" for that one.

    Raises:
        ValueError: names what is required and what is provided.

    Example:
        >>> check_streams("torchtitan", {Need("last_hidden"), Need("hidden_states", layer=3)})
    """
    provided = tuple(provided)
    lacking = named(need for need in requires if not {str(need), need.stream} & set(provided))
    if lacking:
        raise ValueError(
            f"{adapter}: the objective requires {', '.join(lacking)}, expected only what the "
            f"adapter provides: {', '.join(provided)}"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
