"""What an objective reads of a forward pass, as values that a tap, an adapter and a check compare."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from nitp_ops.engine.spec.validation import is_int, shown


@dataclass(frozen=True)
class Need:
    """One stream that an objective reads; its text is the name in messages, such as
    ``hidden_states[4]``.

    Args:
        stream: a field of `Streams`. layer: with "hidden_states", after how many blocks. name: with
            "external", which.
        grad: whether a gradient goes into it. A tapped state without a gradient is
            handed over detached.

    Raises:
        TypeError, ValueError: a layer or a name that the stream does not have, or lacks.

    Example:
        >>> from nitp_ops.objectives import Need
        >>> str(Need("hidden_states", layer=4, grad=False)), str(Need("external", name="aux_loss")), str(Need("head"))
        ('hidden_states[4]', 'external[aux_loss]', 'head')
    """

    stream: str
    layer: int | None = None
    name: str | None = None
    grad: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.stream, str):
            raise TypeError(f"Need: stream is {shown(self.stream)}, expected a field of Streams")
        of_states, of_external = self.stream == "hidden_states", self.stream == "external"
        if not (is_int(self.layer) and self.layer >= 0 if of_states else self.layer is None):  # type: ignore[operator]
            expected = "a number of blocks" if of_states else f'None with "{self.stream}"'
            raise ValueError(f"Need: layer is {shown(self.layer)}, expected {expected}")
        if not (isinstance(self.name, str) if of_external else self.name is None):
            expected = "a name" if of_external else f'None with "{self.stream}"'
            raise ValueError(f"Need: name is {shown(self.name)}, expected {expected}")

    def __str__(self) -> str:
        key = self.layer if self.name is None else self.name
        return self.stream if key is None else f"{self.stream}[{key}]"


def checked(caller: str, needs: Iterable[Need]) -> frozenset[Need]:
    """The needs, each stream once; it wants a gradient where one of them does.

    Raises:
        TypeError: one is no `Need`.
    """
    found: dict[str, Need] = {}
    for need in needs:
        if not isinstance(need, Need):
            raise TypeError(f"{caller}: requires has {shown(need)}, expected a Need")
        before = found.get(str(need), need)
        found[str(need)] = replace(need, grad=need.grad or before.grad)
    return frozenset(found.values())


def named(needs: Iterable[Need]) -> list[str]:
    """Their names, sorted."""
    return sorted(map(str, needs))


def reads(needs: Iterable[Need], stream: str) -> bool:
    """Whether a stream is among them."""
    return any(need.stream == stream for need in needs)
