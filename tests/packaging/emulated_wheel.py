"""The row kernels of a wheel for another processor, run under qemu against the formulas in float64."""

from __future__ import annotations

import shutil
import struct
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nitp_ops import reference

ROOT = Path(__file__).parents[2]
CODES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)
#: A few roundings of the storage dtype.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 2.0**-7,
    torch.float16: 2.0**-10,
}
MISSING = [
    tool for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64-static") if shutil.which(tool) is None
]


class Emulated:
    """The library of an aarch64 wheel, one process of qemu a call."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        zipfile.ZipFile(wheel).extract("nitp_ops/libnitp_ops.so", folder)
        self.library, self.driver, self.file = (
            folder / "nitp_ops/libnitp_ops.so",
            folder / "driver",
            folder / "call",
        )
        cxx = ["aarch64-linux-gnu-g++", "-std=c++20"]
        source = ROOT / "tests/packaging/emulated/driver.cpp"
        subprocess.run(
            [*cxx, "-O1", "-rdynamic", f"-I{ROOT / 'csrc'}", source, "-ldl", "-o", self.driver],
            check=True,
        )
        stub = ["-shared", "-nostdlib", "-x", "c++", "/dev/null", "-Wl,-soname,libtorch_cpu.so"]
        subprocess.run([*cxx, *stub, "-o", folder / "libtorch_cpu.so"], check=True)
        root = ["-L", "/usr/aarch64-linux-gnu", "-E", f"LD_LIBRARY_PATH={folder}"]
        self.command = ["qemu-aarch64-static", *root, self.driver, self.library, self.file]

    def __call__(self, name: str, *arguments: Any) -> None:
        """Run an operator; a tensor (in a list of one: an optional tensor) gets what the kernel
        leaves in it."""
        parts, places = (
            [struct.pack("q", len(name)), name.encode(), struct.pack("q", len(arguments))],
            [],
        )
        for argument in arguments:
            if argument is None:
                parts.append(struct.pack("q", 0))
            elif isinstance(argument, (Tensor, list)):
                tensor = argument if isinstance(argument, Tensor) else argument[0]
                head = (
                    3 if tensor is not argument else 2,
                    CODES.index(tensor.dtype),
                    tensor.dim(),
                    *tensor.shape,
                )
                parts.append(struct.pack(f"{len(head)}q", *head))
                places.append((sum(map(len, parts)), tensor))
                parts.append(bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()))
            else:
                parts.append(
                    struct.pack("q", 1)
                    + struct.pack("d" if isinstance(argument, float) else "q", argument)
                )
        self.file.write_bytes(b"".join(parts))
        done = subprocess.run(self.command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name} under qemu: exit code {done.returncode}: {done.stderr}")
        content = bytearray(self.file.read_bytes())
        for place, tensor in places:
            numbers = torch.frombuffer(
                content, dtype=tensor.dtype, count=tensor.numel(), offset=place
            )
            tensor.copy_(numbers.view(tensor.shape))


def error(got: Tensor, exact: Tensor) -> float:
    """The largest difference, relative to one rounding's allowance of the dtype: at most 1 is
    right."""
    allowed = TOLERANCE[got.dtype] * (exact.abs() + exact.abs().mean())
    return float(((got.double() - exact).abs() / allowed).max())


def cross_entropy(run: Emulated, dtype: torch.dtype) -> float:
    work = torch.float64 if dtype == torch.float64 else torch.float32
    logits, labels = (2 * torch.randn(5, 1003)).to(dtype), torch.randint(0, 1003, (5, 1))
    bias = torch.randn(1003, dtype=work)
    options: dict[str, Any] = {
        "softcap": 3.0,
        "z_loss": 0.1,
        "label_smoothing": 0.1,
        "logit_scale": 0.7,
    }
    wide = logits.to(torch.float64, copy=True).requires_grad_()
    exact = reference.linear_cross_entropy(
        wide,
        torch.eye(1003, dtype=torch.float64),
        labels[:, 0],
        bias=bias.double(),
        reduction="none",
        **options,
    )
    (gradient,) = torch.autograd.grad(exact.sum(), wide)
    stats, target_logit, prediction = (
        torch.zeros(2, 5, dtype=work),
        torch.zeros(5, dtype=work),
        torch.zeros(5).long(),
    )
    order = [options[name] for name in ("label_smoothing", "z_loss", "softcap", "logit_scale")]
    run(
        "cross_entropy_rows_", logits, labels, None, [bias], None, None, stats, target_logit, prediction,
        -100, False, *order, True, None,
    )  # fmt: skip
    return max(error(logits, gradient), error(stats[0], exact.detach()))


def swiglu(run: Emulated, dtype: torch.dtype) -> float:
    gate, up, upstream = (torch.randn(4, 515).to(dtype) for _ in range(3))
    wide = [t.to(torch.float64, copy=True).requires_grad_() for t in (gate, up)]
    exact = reference.swiglu(*wide)
    d_gate, d_up = torch.autograd.grad(exact, wide, upstream.double())
    out = torch.zeros_like(gate)
    run("swiglu_rows", gate, up, out)
    run("swiglu_rows_backward_", gate, up, upstream, None, None)
    return max(error(out, exact.detach()), error(gate, d_gate), error(up, d_up))


def alignment(run: Emulated, dtype: torch.dtype) -> float:
    work = torch.float64 if dtype == torch.float64 else torch.float32
    worst = 0.0
    for code, distance in enumerate(("cosine", "mse", "smooth_l1", "kl")):
        prediction, target = (torch.randn(6, 301).to(dtype) for _ in range(2))
        wide = prediction.to(torch.float64, copy=True).requires_grad_()
        exact = reference.alignment(wide, target.to(torch.float64, copy=True), distance=distance)
        (gradient,) = torch.autograd.grad(exact.sum(), wide)
        stats = torch.zeros(4, 6, dtype=work)
        run("alignment_rows_", prediction, target, None, None, stats, None, None, code, 1e-8, True)
        worst = max(worst, error(stats[0], exact.detach()), error(prediction, gradient))
    return worst


def sums(run: Emulated) -> float:
    total, addend = torch.randn(3, 257), torch.randn(3, 257).bfloat16()
    exact = total.double() + addend.double()
    run("accumulate_rows_", total, addend)
    scaled = addend.clone()
    run("scale_rows_", scaled, torch.full((1,), 0.3))
    return max(error(total, exact), error(scaled, addend.double() * torch.full((1,), 0.3).double()))


def before_and_after(run: Emulated) -> float:
    """Rows weighed by class under their mean, and the sum of their losses."""
    worst = 0.0
    for dtype in (torch.float64, torch.float32):
        labels = torch.randint(0, 9, (301, 1))
        labels[::3], of_class, of_row = (
            -100,
            torch.rand(9, dtype=dtype),
            torch.rand(301, dtype=dtype),
        )
        weight = of_class[labels.clamp(min=0)]
        scale, loss, totals = (
            of_row.clone(),
            torch.zeros((), dtype=torch.float64),
            torch.zeros(5, dtype=torch.int64),
        )
        stats, target_logit, prediction = (
            torch.rand(2, 301, dtype=dtype),
            weight.clone(),
            torch.zeros(301).long(),
        )
        given = labels, [weight], [of_row], None, scale, totals, stats, target_logit, prediction
        run("prepare_rows_", *given, -100, False, 9, True, False, -1)
        left = (
            totals.tolist() == [200, 200, 1, 299, -1]
            and not stats[0].any()
            and stats[1].isnan().all()
        )
        assert left and target_logit.isnan().all() and (prediction == -1).all()
        counted = torch.where(labels == -100, 0, weight).double().sum()
        exact = torch.where(labels[:, 0] == -100, 0, of_row.double()) / counted
        stats[0] = of_row
        run("finish_rows_", stats, scale, loss)
        worst = max(worst, error(scale, exact), error(loss, (scale * of_row).double().sum()))
    return worst


def check(wheel: Path, folder: Path) -> dict[str, float]:
    """Each kernel's largest error in its own allowance: above 1 it is wrong."""
    torch.manual_seed(0)
    run = Emulated(wheel, folder)
    errors = {
        f"{kernel.__name__} {str(dtype).removeprefix('torch.')}": kernel(run, dtype)
        for kernel in (cross_entropy, swiglu, alignment)
        for dtype in CODES[:4]
    }
    return errors | {
        "accumulate and scale": sums(run),
        "before and after the chunks": before_and_after(run),
    }
