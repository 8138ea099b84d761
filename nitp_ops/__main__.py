"""python -m nitp_ops env | doctor | list | explain: what is installed, whether it works, what it
offers."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import time
from pathlib import Path

import torch

import nitp_ops

from . import reference
from .core import library
from .core.devices import sum_dtype
from .kernels import select


def env() -> int:
    """Versions, build and CPU, one fact a line."""
    print(
        f"nitp_ops {nitp_ops.__version__}   torch {torch.__version__}   python "
        f"{platform.python_version()}"
    )
    print(f"package  {Path(nitp_ops.__file__).parent}")
    print(
        f"machine  {platform.machine()}, {torch.get_num_threads()} threads, cuda "
        f"{torch.cuda.is_available()}"
    )
    if select.load_error is not None:
        print(f"library  none: {select.load_error}")
        return 0
    print(f"library  {select.LIBRARY.name}, instruction set {library.instruction_set()}")
    facts = library.build_info()
    kernels = facts.pop("kernels")
    for key, value in facts.items():
        print(f"built    {key}: {value or 'none'}")
    if kernels:
        most, spills = max(k["registers"] for k in kernels), sum(k["spills"] for k in kernels)
        print(
            f"kernels  {len(kernels)} for CUDA, at most {most} registers a thread, {spills} "
            "bytes spilled"
        )
    return 0


def gradient_error(backend: str, device: torch.device) -> float:
    """The largest relative difference of loss and gradients from the reference, over the four ops,
    in float64 (float32 on a device without it)."""
    generator, dtype = torch.Generator().manual_seed(0), sum_dtype(device)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).to(device).requires_grad_()

    hidden, weight, gate, up, down = (
        leaf(2, 9, 8),
        leaf(33, 8),
        leaf(12, 8),
        leaf(12, 8),
        leaf(8, 12),
    )
    target = leaf(2, 9, 8).detach()
    labels = torch.arange(18, device=device).view(2, 9)

    def losses(book, **options) -> list[torch.Tensor]:
        return [
            book.linear_cross_entropy(hidden, weight, labels, **options),
            book.implicit_token_loss(hidden, target, gate, up, down, **options),
            book.alignment(hidden, target, **options).sum(),
            book.swiglu(gate, up, **options).square().sum(),
        ]

    inputs = (hidden, weight, gate, up, down)
    errors = []
    for ours, exact in zip(losses(nitp_ops, backend=backend), losses(reference), strict=True):
        a = (ours.detach(), *torch.autograd.grad(ours, inputs, allow_unused=True))
        b = (exact.detach(), *torch.autograd.grad(exact, inputs, allow_unused=True))
        for x, y in zip(a, b, strict=True):
            if (x is None) != (y is None):
                return float("inf")  # a gradient is missing
            if x is not None and y is not None:
                errors.append((x - y).norm() / y.norm())
    return float(torch.stack(errors).max())  # unlike Python's max, a NaN stays a NaN


def doctor() -> int:
    """A gradient check of every backend; 1 where what is installed fails, or where calls on CPU do
    not run compiled."""
    broken = False
    other = torch.accelerator.current_accelerator()
    checks = [("native", "native", "cpu")]
    if torch.cuda.is_available():
        checks.append(("cuda", "native", "cuda"))
    checks += [("triton", "triton", "cuda"), ("torch", "torch", "cpu")]
    if other is not None and other.type != "cuda":
        checks.append((other.type, "torch", other.type))
    checks.append(("reference", "reference", "cpu"))
    for name, backend, kind in checks:
        device = torch.device(kind)
        reason = None if backend == "reference" else select.unavailable_reason(device, backend)
        if reason is not None:
            # CUDA kernels are built only where nvcc is
            installed = select.installed(backend) and name != "cuda"
            print(f"{name:10} {'BROKEN' if installed else 'off'}: {reason}")
            broken |= installed or name == "native"  # without it, calls on CPU do not run compiled
            continue
        start = time.perf_counter()
        error, dtype = gradient_error(backend, device), sum_dtype(device)
        ok = error < (1e-10 if dtype == torch.float64 else 1e-4)
        result = f"largest gradient error {error:.1e} in {str(dtype).removeprefix('torch.')}"
        print(
            f"{name:10} {'ok' if ok else 'BROKEN'}: {result}, {time.perf_counter() - start:.2f} s"
        )
        broken |= not ok
    return int(broken)


def explain(arguments: argparse.Namespace) -> int:
    """The resolved objective: layers, weights, parameters, FLOPs, bytes, passes."""
    objectives = nitp_ops.objectives
    cost_model = importlib.import_module("nitp_ops.engine.reports.cost_model")
    try:
        sizes = {
            "hidden_size": arguments.hidden,
            "vocab_size": arguments.vocab,
            "num_layers": arguments.layers,
        }
        info = objectives.ModelInfo(**sizes)
        with torch.device("meta"):
            print(objectives.build(arguments.spec, model=info).explain(arguments.tokens))
        if arguments.mesh is not None:
            shape = cost_model.Mesh.parse(arguments.mesh)
            cost = cost_model.estimate_cost(arguments.spec, info, shape, tokens=arguments.tokens)
            print(f"on each rank of a mesh {arguments.mesh}:", *cost.lines(), sep="\n    ")
    except (TypeError, ValueError) as error:  # SpecError is a ValueError
        print(f"nitp_ops explain: {error}", file=sys.stderr)
        return 2
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nitp_ops", description=__doc__)
    parser.add_argument("--version", action="version", version=f"nitp_ops {nitp_ops.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="versions, build and CPU")
    commands.add_parser("doctor", help="a gradient check of every backend")
    commands.add_parser("list", help="the registered objectives")
    spec = commands.add_parser("explain", help="what an objective resolves to")
    spec.add_argument("spec", help='e.g. "ntp + 0.8*nitp(target_layer=0.2)"')
    for name, meaning in (
        ("hidden", "hidden size"),
        ("vocab", "vocabulary size"),
        ("layers", "number of layers"),
    ):
        spec.add_argument(f"--{name}", type=int, required=True, help=meaning)
    spec.add_argument(
        "--tokens", type=int, default=8192, help="tokens of a batch, for the plan of passes"
    )
    spec.add_argument(
        "--mesh", help="bytes sent and held by a rank that has these tokens, e.g. tp=8,dp=1024,cp=4"
    )
    chosen = parser.parse_args(arguments)
    if chosen.command in ("explain", "list"):
        try:
            _ = nitp_ops.objectives
        except AttributeError as error:
            print(f"nitp_ops {chosen.command}: {error}", file=sys.stderr)
            return 2
    if chosen.command == "explain":
        return explain(chosen)
    if chosen.command == "list":
        print("\n".join(nitp_ops.engine.explain.listing()))
        return 0
    return {"env": env, "doctor": doctor}[chosen.command]()


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
