"""Argument checks. One form of message: `op: argument has|is <value>, expected <the allowed>`."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")
_INT64 = torch.iinfo(torch.int64)


class BackendError(RuntimeError):
    """No backend can run this call; the message lists every backend with its reason."""


def name_of(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def is_tensor(op: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} is a {type(value).__name__}, expected a torch.Tensor")


def is_dtensor(value: Any) -> bool:
    # where torch.distributed.tensor was never imported there is no DTensor; importing it took 2.3 s
    # (2 busy cores)
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(value, distributed.DTensor)


def is_plain(op: str, argument: str, value: Any) -> None:
    """No DTensor: an op on its local part would be silently wrong, one on the whole would gather
    it."""
    if is_dtensor(value):
        placements = ", ".join(map(str, value.placements))
        raise TypeError(
            f"{op}: {argument} is a DTensor ({placements}), expected a plain tensor (or, for an "
            "unembedding with Shard(0), group=nitp_ops.distributed.VocabularyShards())"
        )


def has_dtype(op: str, argument: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        expected = " or ".join(name_of(dtype) for dtype in allowed)
        raise TypeError(f"{op}: {argument} is {name_of(tensor.dtype)}, expected {expected}")


def is_float(op: str, argument: str, value: object) -> None:
    """A dense tensor of a dtype that the row kernels serve."""
    is_plain(op, argument, value)
    is_tensor(op, argument, value)
    assert isinstance(value, Tensor)
    if value.layout != torch.strided:
        raise TypeError(
            f"{op}: {argument} has the layout {name_of(value.layout)}, expected strided"
        )
    has_dtype(op, argument, value, FLOATS)


def has_shape(
    op: str, argument: str, tensor: Tensor, expected: Sequence[int], meaning: str = ""
) -> None:
    if tuple(tensor.shape) != tuple(expected):
        note = f" ({meaning})" if meaning else ""
        raise ValueError(
            f"{op}: {argument} has shape {tuple(tensor.shape)}, expected {tuple(expected)}{note}"
        )


def has_dim(op: str, argument: str, tensor: Tensor, least: int, expected: str) -> None:
    if tensor.dim() < least:
        raise ValueError(f"{op}: {argument} has shape {tuple(tensor.shape)}, expected {expected}")


def same_device(op: str, argument: str, tensor: Tensor, like: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{op}: {argument} is on {tensor.device}, expected {other.device} (where {like} is)"
        )


def one_of(op: str, argument: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(
            f"{op}: {argument} is {value!r}, expected one of {', '.join(map(repr, allowed))}"
        )


def constant(value: float) -> float:
    """The number, a constant of the graph while tracing: another value compiles anew.

    As a symbol it would reach a custom op, which AOTAutograd turns into a constant behind its own
    cache: compiled code of an earlier value then ran for a later one (pytorch issue 197889)."""
    if not torch.compiler.is_compiling():
        return value
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return guard_scalar(value)


def number(
    op: str,
    argument: str,
    value: object,
    *,
    least: float,
    open_end: bool = False,
    dtype: torch.dtype = torch.float64,
) -> float:
    """A finite real number `>= least` (`> least` with open_end), as float, a `constant`.

    dtype: of the arithmetic with it; there it must not be infinite, nor zero with open_end (a
    softcap of zero means none)."""
    return constant(_number(op, argument, value, least, open_end, dtype))


def _number(
    op: str, argument: str, value: object, least: float, open_end: bool, dtype: torch.dtype
) -> float:
    expected = f"a number {'>' if open_end else '>='} {least:g}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {argument} is {value!r}, expected {expected}")
    try:
        real = float(value)
    except OverflowError:
        real = math.inf
    if not (real > least if open_end else real >= least) or real == math.inf:
        raise ValueError(f"{op}: {argument} is {value!r}, expected {expected}")
    range_ = torch.finfo(dtype)
    if real > range_.max or (open_end and abs(real) < range_.tiny):
        raise ValueError(
            f"{op}: {argument} is {value!r}, expected {expected} in the range of {name_of(dtype)}"
        )
    return real


def integer(op: str, argument: str, value: object, *, least: int = _INT64.min) -> int:
    """An integer `>= least` that int64 holds."""
    expected = "an integer" if least == _INT64.min else f"an integer >= {least}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {argument} is {value!r}, expected {expected}")
    if not _INT64.min <= value <= _INT64.max:
        raise ValueError(f"{op}: {argument} is {value}, expected {expected} of 64 bits")
    if value < least:
        raise ValueError(f"{op}: {argument} is {value}, expected {expected}")
    return value


def scalar(op: str, argument: str, value: Any, dtype: torch.dtype) -> Any:
    """A positive number for arithmetic in dtype, as float (while tracing as it is: no constant), or
    a 0-d tensor without gradient, which is never read on the host."""
    if isinstance(value, Tensor):
        is_plain(op, argument, value)
        has_shape(op, argument, value, ())
        no_gradient(op, argument, value)
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{op}: {argument} is {name_of(value.dtype)}, expected a real number")
        return value
    real = _number(op, argument, value, 0.0, True, dtype)
    return value if torch.compiler.is_compiling() else real


def no_gradient(op: str, argument: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(
            f"{op}: {argument} requires a gradient, expected a detached tensor (it gets none)"
        )


def labels_inside(
    op: str, argument: str, labels: Tensor, ignore_index: int, classes: int, many: bool
) -> None:
    """Host check of values: each label lies in [0, classes) or is absent (ignore_index; with many a
    row: negative)."""
    wrong = labels >= classes if many else (labels < 0) | (labels >= classes)
    wrong = wrong & (labels != ignore_index)  # out of place: functionalize follows that
    if bool(wrong.any()):
        where = tuple(int(i) for i in wrong.nonzero()[0])
        absent = "absent: negative or " if many else ""
        expected = f"[0, {classes}) or {absent}ignore_index={ignore_index}"
        raise IndexError(
            f"{op}: {argument}{list(where)} is {int(labels[where])}, expected a value in {expected}"
        )


def is_buffer(op: str, argument: str, value: object, like: str, tensor: Tensor) -> None:
    """A dense buffer that a backward pass adds the gradient of `tensor` into: float32 (float64 for
    float64)."""
    is_plain(op, argument, value)
    is_tensor(op, argument, value)
    assert isinstance(value, Tensor)
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    has_dtype(op, argument, value, (wide,))
    has_shape(op, argument, value, tensor.shape, f"{like}'s")
    same_device(op, argument, value, like, tensor)
    no_gradient(op, argument, value)
    if not value.is_contiguous():
        raise ValueError(
            f"{op}: {argument} has strides {value.stride()}, expected a contiguous tensor"
        )
    if torch.is_grad_enabled() and not tensor.requires_grad:
        raise ValueError(
            f"{op}: {argument} is given, but {like} requires no gradient; expected one that does, "
            "or no buffer"
        )


def host_reads(device: torch.device) -> bool:
    """Whether values may steer the host: never those of a GPU, whose queue would run empty
    meanwhile."""
    return device.type == "cpu"


def plain(tensor: Tensor) -> bool:
    """Whether values may be read on the host: a CPU tensor that is neither traced, fake nor
    batched."""
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:  # make_fx
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # type: ignore[attr-defined]
    return host_reads(tensor.device) and not wrapped


def plain_autograd(op: str, *tensors: Tensor | None) -> None:
    """Refuses by name what a custom op cannot follow: forward mode would silently lose its
    tangent."""
    if torch.compiler.is_compiling():
        return
    dual = forward_ad._current_level >= 0
    stack = torch._C._functorch.peek_interpreter_stack()  # type: ignore[attr-defined]
    transformed = stack is not None
    if not dual and not transformed:
        return
    for tensor in tensors:
        if tensor is None:
            continue
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # type: ignore[attr-defined]
            refused = "a torch.func transform (vmap, grad, vjp, jvp, functionalize)"
        elif forward_ad.unpack_dual(tensor).tangent is not None:
            refused = "forward-mode differentiation"
        else:
            continue
        raise NotImplementedError(
            f"{op}: {refused} is not supported, expected reverse mode (or backend='reference')"
        )
