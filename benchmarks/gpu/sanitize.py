"""`python -m benchmarks.gpu.sanitize`: every CUDA row kernel once on small awkward shapes, under
compute-sanitizer.

Nothing but row kernels runs on the device (inputs come from the host), each result is compared with
the CPU kernels'. `--ops` adds one forward and backward of each public op. Run it with
PYTORCH_NO_CUDA_MEMORY_CACHING=1: then every tensor is an allocation of its own, and memcheck sees
the first byte beyond it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import nitp_ops
from nitp_ops.kernels import select, table

#: One element, one pack and its neighbours, many steps of a block, and a row that no shared memory
#: of one block holds.
COLUMNS = (1, 7, 8, 33, 1000)
LONG = 150001
NARROW = (torch.float32, torch.bfloat16, torch.float16)
FLOATS = (*NARROW, torch.float64)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
COSINE, MSE, SMOOTH_L1, KL = range(4)


def _rows(n: int, columns: int, dtype: torch.dtype, dense: bool = True) -> Tensor:
    """Random rows; not dense: each an odd distance behind the last, so that most are unaligned."""
    if dense:
        return torch.randn(n, columns, dtype=torch.float64).to(dtype)
    return torch.randn(n, columns + 3, dtype=torch.float64).to(dtype)[:, 1 : columns + 1]


def _working(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _swiglu() -> Iterator[tuple[Any, ...]]:
    for dtype, columns, dense in product(FLOATS, COLUMNS, (True, False)):
        yield (
            _rows(3, columns, dtype, dense),
            _rows(3, columns, dtype),
            _rows(3, columns, dtype, dense),
        )


def _swiglu_backward() -> Iterator[tuple[Any, ...]]:
    for dtype, columns, dense in product(FLOATS, COLUMNS, (True, False)):
        gate, up, upstream, d_gate, d_up = (_rows(3, columns, dtype, dense) for _ in range(5))
        yield gate, up, upstream, None, None
        yield gate, up, upstream, d_gate, d_up


def _alignment() -> Iterator[tuple[Any, ...]]:
    pairs = [(dtype, dtype) for dtype in FLOATS] + [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ]
    for (p, z), distance, columns in product(pairs, (COSINE, MSE, SMOOTH_L1, KL), COLUMNS):
        prediction, target = _rows(3, columns, p), _rows(5, columns, z, dense=False)
        work = _working(prediction, target)
        stats, scale = torch.zeros(4, 3, dtype=work), torch.tensor([0.5, 0.0, 2.0], dtype=work)
        index = torch.tensor([4, 0, 4])
        yield prediction, target, index, scale, stats, None, None, distance, 1e-6, True
        gradients = _rows(3, columns, p, dense=False), _rows(3, columns, z)
        yield prediction, target[:3], None, None, stats, *gradients, distance, 1e-6, True
        yield prediction, target, index, None, stats, None, None, distance, 1e-6, False


def _cross_entropy() -> Iterator[tuple[Any, ...]]:
    sizes = [
        *product(FLOATS, COLUMNS, (1, 4), (True, False)),
        *product(NARROW, (LONG,), (1,), (True, False)),
    ]
    for dtype, columns, targets, plain in sizes:
        logits = _rows(3, columns, dtype, dense=plain)
        work = _working(logits)
        labels = torch.randint(0, columns, (3, targets))
        labels[1] = -100
        weights = None if plain and targets == 1 else torch.rand(3, targets, dtype=work)
        extras = [None if plain or targets > 1 else torch.rand(columns, dtype=work)]
        bias, scale = (None if plain else torch.rand(size, dtype=work) for size in (columns, 3))
        values = torch.zeros(2 if plain else 3, 3, dtype=work), torch.zeros(3, targets, dtype=work)
        loss = (0.0, 0.0, 0.0, 0.7) if plain else (0.1, 1e-3, 5.0, 0.7)
        best = torch.zeros(3, dtype=torch.int64)
        for gradient in (True, False):
            yield (
                logits,
                labels,
                weights,
                bias,
                *extras,
                scale,
                *values,
                best,
                -100,
                targets > 1,
                *loss,
                gradient,
            )


def _cross_entropy_gradient() -> Iterator[tuple[Any, ...]]:
    for dtype, columns, targets, plain in product(FLOATS, COLUMNS, (1, 4), (True, False)):
        logits = _rows(3, columns, dtype, dense=plain)
        work = _working(logits)
        labels = torch.randint(-1, columns, (3, targets))
        scale, cap = torch.rand(3, targets, dtype=work), 0.0 if plain else 5.0
        scale[1] = 0  # a row of which nothing is asked
        extras = [None if plain else torch.rand(columns, dtype=work) for _ in range(2)]
        z = 0.7 * (logits.to(work) if extras[0] is None else logits.to(work) + extras[0])
        at = (cap * (z / cap).tanh() if cap else z).gather(1, labels.clamp(min=0))
        factors = torch.tensor([[99.0, 99.0, 99.0], [0.5, 0.0, 2.0], [0.0, 0.0, 0.1]], dtype=work)
        yield logits, labels, scale, at, *extras, factors, cap, 0.7


def _accumulate() -> Iterator[tuple[Any, ...]]:
    for columns, dense in product(COLUMNS, (True, False)):
        yield _rows(3, columns, torch.float32, dense), _rows(3, columns, torch.bfloat16, dense)


def _scale() -> Iterator[tuple[Any, ...]]:
    for dtype, columns, factor in product(FLOATS, COLUMNS, (0.0, 1.0, 0.37)):
        given = _rows(3, columns, dtype, dense=False)
        yield given, torch.tensor([factor], dtype=_working(given))


def _prepare() -> Iterator[tuple[Any, ...]]:
    """More rows than a block takes at once, too."""
    for dtype, rows_, targets, weighs in product(
        (torch.float32, torch.float64), (0, 3, 9001), (1, 4), (True, False)
    ):
        labels = torch.randint(-2, 40, (rows_, targets))
        labels[torch.rand(rows_, targets) < 0.5] = -100
        weight, of_row = (
            torch.rand(size, dtype=dtype) if weighs else None for size in ((rows_, targets), rows_)
        )
        one = torch.rand((), dtype=dtype)
        for normalizer, most in ((one, -1), (None, rows_ // 3), (None, rows_)):
            scale, stats = torch.zeros(rows_, dtype=dtype), torch.zeros(3, rows_, dtype=dtype)
            given = (
                labels,
                weight,
                of_row,
                normalizer,
                scale,
                torch.zeros(5, dtype=torch.int64),
                stats,
            )
            left = torch.zeros(rows_, targets, dtype=dtype), torch.zeros(rows_, dtype=torch.int64)
            yield *given, *left, -100, targets > 1, 30, True, weighs, most


def _finish() -> Iterator[tuple[Any, ...]]:
    for dtype, rows_ in product((torch.float32, torch.float64), (0, 3, 9001)):
        losses, scale = _rows(4, rows_, dtype, dense=False), torch.rand(rows_, dtype=dtype)
        losses[0, ::5], scale[::5] = torch.nan, 0
        yield losses, scale, torch.zeros((), dtype=torch.float64)


#: Row kernel -> arguments that reach its branches.
BRANCHES: dict[str, Callable[[], Iterator[tuple[Any, ...]]]] = {
    "swiglu_rows": _swiglu,
    "swiglu_rows_backward_": _swiglu_backward,
    "alignment_rows_": _alignment,
    "cross_entropy_rows_": _cross_entropy,
    "cross_entropy_gradient_rows_": _cross_entropy_gradient,
    "accumulate_rows_": _accumulate,
    "scale_rows_": _scale,
    "prepare_rows_": _prepare,
    "finish_rows_": _finish,
}


def calls(kernel: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of every call: typical ones at every width, and what reaches the kernel's branches."""
    for dtype, columns in product((torch.float64, torch.float32, torch.bfloat16), COLUMNS):
        yield table.all_kernels()[kernel].sample(3, columns, dtype).arguments
    yield from BRANCHES.get(kernel, lambda: iter(()))()


def moved(value: Any, device: torch.device) -> Any:
    """A copy on `device` with the strides of the original (a tensor), or the value itself."""
    if not isinstance(value, Tensor):
        return value
    whole = torch.empty(value.untyped_storage().nbytes() // value.itemsize, dtype=value.dtype)
    whole.copy_(value.as_strided(whole.shape, (1,), 0))
    return whole.to(device).as_strided(value.shape, value.stride(), value.storage_offset())


def without_totals(kernel: str, here: Sequence[Any], there: Sequence[Any]) -> None:
    """Of prepare_rows_ a device whose host reads no values counts the rows alone: so do those of
    `here` then."""
    if kernel == "prepare_rows_" and there[5][1] < 0:
        here[5][1:] = -1


def differences(kernel: str, kernels: Any, device: torch.device) -> Iterator[str]:
    """One line for each call whose results are not those of the CPU kernel."""
    for arguments in calls(kernel):
        here = [moved(each, torch.device("cpu")) for each in arguments]
        there = [moved(each, device) for each in arguments]
        getattr(torch.ops.nitp_ops, kernel)(*here)
        getattr(kernels, kernel)(*there)
        without_totals(kernel, here, there)
        for place, (exact, found) in enumerate(zip(here, there, strict=True)):
            if isinstance(exact, Tensor) and not _near(found.cpu(), exact):
                shapes = ", ".join(
                    f"{str(each.dtype).removeprefix('torch.')}{list(each.shape)}"
                    if isinstance(each, Tensor)
                    else str(each)
                    for each in arguments
                )
                yield f"{kernel}({shapes}): argument {place} differs from the CPU kernel's"


def _near(found: Tensor, exact: Tensor) -> bool:
    if not exact.is_floating_point():
        return torch.equal(found, exact)
    size = TOLERANCE[exact.dtype]
    return torch.allclose(found.double(), exact.double(), rtol=size, atol=size, equal_nan=True)


def ops(device: torch.device, backend: str) -> None:
    """One forward and backward of each public op."""
    make = partial(torch.randn, dtype=torch.float32)
    hidden, weight, gate, up, down = (
        make(*shape).to(device).requires_grad_()
        for shape in ((2, 9, 16), (130, 16), (24, 16), (24, 16), (16, 24))
    )
    labels = torch.randint(0, 130, (2, 9))
    labels[0, 3] = -100
    labels, target = labels.to(device), make(2, 9, 16).to(device)
    token = nitp_ops.linear_cross_entropy(
        hidden, weight, labels, chunk_bytes=130 * 4 * 5, backend=backend
    )
    latent = nitp_ops.implicit_token_loss(
        hidden, target, gate, up, down, chunk_bytes=4000, backend=backend
    )
    rows_loss = nitp_ops.alignment(hidden, target, backend=backend).sum()
    (
        token + latent + rows_loss + nitp_ops.swiglu(gate, up, backend=backend).square().sum()
    ).backward()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.sanitize", description=__doc__)
    parser.add_argument(
        "--backend", choices=("native", "triton"), default="native", help="whose row kernels"
    )
    parser.add_argument(
        "--ops", action="store_true", help="also one step of each public op (runs library GEMMs)"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "benchmarks.gpu.sanitize: torch sees no GPU (torch.cuda.is_available() is False)",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda")
    reason = select.unavailable_reason(device, options.backend)
    if reason:
        print(f"benchmarks.gpu.sanitize: {options.backend}: {reason}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    known = table.all_kernels()
    wrong = [
        line
        for kernel in known
        for line in differences(kernel, select.row_kernels(options.backend), device)
    ]
    if options.ops:
        ops(device, options.backend)
    torch.cuda.synchronize()
    print(
        "\n".join(
            [*wrong, f"{len(known)} kernels of {options.backend}, {len(wrong)} results differ"]
        )
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
