"""The table of row kernels: one row each, declared by its torch implementation.

A function of `torch_rows` under `@row_kernel` is a row: its name is the operator's, its signature
the schema. Schemas where the compiled library is absent, the look-up of the torch and Triton
implementations, benchmarks, the sanitized script and the tests that compare backends go by this
table. The compiled kernels have theirs in csrc/kernel_params.h.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., None])
_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "int": "int",
    "float": "float",
    "bool": "bool",
}


@dataclass(frozen=True)
class Sample:
    """A typical call: its arguments, the bytes that it must move, what puts back an input that it
    overwrites."""

    arguments: tuple[Any, ...]
    moved: int
    restore: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class RowKernel:
    """sample(rows, columns, dtype) makes the arguments of a call, on torch's default device."""

    name: str
    schema: str
    sample: Callable[[int, int, torch.dtype], Sample]


_declared: dict[str, RowKernel] = {}


def row_kernel(
    *, writes: Sequence[str], sample: Callable[[int, int, torch.dtype], Sample]
) -> Callable[[Function], Function]:
    """Declares a row kernel by its implementation in torch operations; writes: the arguments that
    it overwrites."""

    def declare(function: Function) -> Function:
        name = function.__name__
        _declared[name] = RowKernel(name, _schema(function, writes), sample)
        return function

    return declare


def _schema(function: Callable[..., None], writes: Sequence[str]) -> str:
    """The schema without the name: '(Tensor gate, Tensor up, Tensor(a!) out) -> ()'."""
    letters, arguments = iter("abcdefgh"), []
    for name, parameter in inspect.signature(function).parameters.items():
        kind = _TYPES[parameter.annotation]
        if name in writes:
            kind = kind.replace("Tensor", f"Tensor({next(letters)}!)")
        default = "" if parameter.default is parameter.empty else f"={parameter.default}"
        arguments.append(f"{kind} {name}{default}")
    return f"({', '.join(arguments)}) -> ()"


def _modules(package: str) -> list[ModuleType]:
    """Every module of the package nitp_ops.kernels.<package>."""
    path = importlib.import_module(f".{package}", __package__).__path__
    names = sorted(module.name for module in pkgutil.iter_modules(path))
    return [importlib.import_module(f".{package}.{name}", __package__) for name in names]


@functools.cache
def all_kernels() -> Mapping[str, RowKernel]:
    """Row kernels by name, in alphabetical order, not in that of the imports."""
    _modules("torch_rows")
    return dict(sorted(_declared.items()))


@functools.cache
def implementations(package: str) -> Mapping[str, Callable[..., None]]:
    """The row kernels that the modules of "torch_rows" or "triton" define, by name."""
    return {
        name: function
        for module in _modules(package)
        for name, function in vars(module).items()
        if name in all_kernels() and function.__module__ == module.__name__
    }


def attributes(package: str) -> Callable[[str], Callable[..., None]]:
    """A `__getattr__` by which the package has its row kernels as attributes."""

    def look_up(name: str) -> Callable[..., None]:
        # the import system looks dunders up while the package is loading
        if name.startswith("__") or name not in implementations(package):
            raise AttributeError(f"module 'nitp_ops.kernels.{package}' has no attribute {name!r}")
        return implementations(package)[name]

    return look_up
