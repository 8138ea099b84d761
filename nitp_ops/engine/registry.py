"""Names of objectives: registered, built in, or an entry point in the group
``nitp_ops.objectives``."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from .base import HeadTerm, LatentTerm, Objective
from .spec.validation import SpecError, listing, suggestion

GROUP = "nitp_ops.objectives"
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_registered: dict[str, type[Objective]] = {}
_built_in: dict[str, EntryPoint] = {}
_T = TypeVar("_T", bound=type[Objective])


def register(name: str) -> Callable[[_T], _T]:
    """Class decorator: makes a frozen keyword-only dataclass available in specs under ``name``.

    Raises:
        TypeError: no such dataclass, or neither a HeadTerm nor a LatentTerm.
        ValueError: no identifier, or a name that another class holds.

    Example:
        >>> from dataclasses import dataclass
        >>> from nitp_ops.objectives import NTP, Spec, parse
        >>> @register("smooth_ntp")
        ... @dataclass(frozen=True, kw_only=True)
        ... class SmoothNTP(NTP):
        ...     label_smoothing: float = 0.1
        >>> parse("smooth_ntp").terms[0].label_smoothing
        0.1
    """

    def add(cls: _T) -> _T:
        parameters = cls.__dict__.get("__dataclass_params__")
        if not (issubclass(cls, HeadTerm | LatentTerm) and parameters and parameters.frozen):
            raise TypeError(
                f"register: {cls.__name__} is no frozen dataclass under HeadTerm or LatentTerm, "
                "expected @dataclass(frozen=True, kw_only=True)"
            )
        late = [field.name for field in dataclasses.fields(cls) if not field.kw_only]
        if late:
            raise TypeError(
                f"register: {cls.__name__} has positional fields {', '.join(late)}, "
                "expected kw_only=True"
            )
        held = _held(name)
        if held not in (None, _home(cls)):
            holder = held.rpartition(":")[2]
            raise ValueError(
                f'register: name is "{name}", expected one that {holder} does not hold'
            )
        cls.name = name
        _registered[name] = cls
        return cls

    if not NAME.fullmatch(name):
        raise ValueError(f'register: name is "{name}", expected a Python identifier')
    return add


def offer(package: str, homes: Mapping[str, str]) -> None:
    """Names that a package has built in, as ``{name: "module:class"}`` inside it: found like a
    plugin's."""
    _built_in.update(
        {name: EntryPoint(name, f"{package}.{home}", GROUP) for name, home in homes.items()}
    )


def available() -> tuple[str, ...]:
    """Names of all objectives, sorted; what is not loaded yet is listed without being imported."""
    return tuple(sorted({*_registered, *_built_in, *_plugins()}))


def find(name: str) -> type[Objective]:
    """The class behind a name, which is imported when it is first named.

    Raises:
        SpecError: an unknown name (with the nearest known one), or a plugin that does not load
            (with its reason).
    """
    if name not in _registered:
        plugin = _built_in.get(name) or _plugins().get(name)
        if plugin is None:
            known = available()
            raise SpecError(
                [
                    f'"{name}" is no objective, expected one of '
                    f"{listing(known)}.{suggestion(name, known)}"
                ]
            )
        _load(name, plugin)
    return _registered[name]


def plugin_of(name: str) -> str | None:
    """``module:class`` of a plugin that is not imported yet, else None."""
    plugin = None if name in _registered or name in _built_in else _plugins().get(name)
    return None if plugin is None else plugin.value


def _held(name: str) -> str | None:
    """``module:class`` of the class that has a name, imported or built in."""
    if name in _registered:
        return _home(_registered[name])
    return _built_in[name].value if name in _built_in else None


def _home(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _plugins() -> Mapping[str, EntryPoint]:
    return _plugins_in(tuple((folder, _changed(folder)) for folder in sys.path))


@functools.lru_cache(maxsize=1)
def _plugins_in(path: tuple[tuple[str, int], ...]) -> Mapping[str, EntryPoint]:
    """Those on sys.path, read again where a folder has changed: every installed package is read,
    which takes long."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _changed(folder: str) -> int:
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return 0


def _load(name: str, plugin: EntryPoint) -> None:
    try:
        loaded = plugin.load()
        if name not in _registered:
            register(name)(loaded)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit too: a plugin does not end the program that names it
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise SpecError(
            [f'"{name}" is a plugin ({plugin.value}) that does not load: {reason}']
        ) from error
