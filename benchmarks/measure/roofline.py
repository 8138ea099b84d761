"""What an op must take on a GPU: a model of its time from FLOPs, bytes and launches, to be read
beside measurements.

    time = FLOPs / R + bytes / B + launches L            ratio = time / (FLOPs / R)

R, B: the rate of a large GEMM and of a copy (read and written) on the device; L: what a small
    kernel takes. Nothing
overlaps. With C chunks of rows (`nitp_ops.explain`), s bytes per element of the GEMMs:

    linear_cross_entropy, [N, d] by [V, d]               implicit_token_loss, width d, inner m = 4 d
    FLOPs     6 N d V                                     72 N d^2
    rows      CROSS_ENTROPY 2 s N V (CAPPED: a softcap)   SWIGLU 8 s N m + ALIGNMENT 3 s N d
    dW        (6 + SUM (2 + 8 (C - 1))) V d if C > 1      the same of 12 d^2
    launches  8 + 4 C                                     24 + 7 C

rows: every logit is read and written once; SwiGLU reads two and writes one forward, reads three and
    writes two
backward; the alignment reads two and writes one. dW: with several chunks the weight gradient is
summed in float32, so that the first GEMM writes 2 bytes more a number than GEMM time has and each
further one reads and writes 4, of which a part hides behind the GEMM itself; a cast at the end
reads 4 and writes 2. launches: as a test counts them at most. The ratio of a row kernel to a copy
is its constant here. The constants fit what an H100 showed (decision 0036) and the instructions of
the kernels; nothing else in this file does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

import nitp_ops
from benchmarks.cases import OPS, Sizes

ITEM = torch.bfloat16.itemsize
#: Time of a row kernel over a copy of the bytes that it must move, in bfloat16.
CROSS_ENTROPY, SWIGLU, ALIGNMENT = 1.07, 1.02, 1.05
#: Of the bytes by which a GEMM adds to a sum in memory, the part that takes time.
SUM = 0.4
ROW_KERNELS = {
    "cross_entropy_rows_": CROSS_ENTROPY,
    "cross_entropy_gradient_rows_": SWIGLU,  # one pass, as many bytes in flight
    "swiglu_rows": SWIGLU,
    "swiglu_rows_backward_": SWIGLU,
    "alignment_rows_": ALIGNMENT,
    "accumulate_rows_": 1.0,
    "prepare_rows_": 2.0,  # so few bytes that launches are what it takes: two, a copy is one
}


@dataclass(frozen=True)
class Rates:
    """FLOP/s of a GEMM, bytes/s of a copy, seconds of a small kernel."""

    flops: float
    bytes: float
    launch: float = 2.5e-6

    def __str__(self) -> str:
        return (
            f"{self.flops / 1e12:.0f} TFLOP/s, {self.bytes / 1e12:.1f} TB/s of copy, "
            f"{1e6 * self.launch:.1f} us a small kernel"
        )


#: Taken for an H200 until one is measured.
H200 = Rates(790e12, 4.3e12)
#: Special functions (exp2, tanh, 1/x) a second: 16 a clock on each of its 132 multiprocessors, at
#: 1.98 GHz.
SPECIAL_FUNCTIONS = 132 * 16 * 1.98e9
#: As CROSS_ENTROPY, under a softcap: not the copy bounds a logit but its special functions, three
#: in the pass that adds up and two in the one that writes.
CAPPED = 5 / SPECIAL_FUNCTIONS / (2 * ITEM / H200.bytes)


def measured_rates(document: Mapping[str, Any]) -> Rates | None:
    """Those of the device of these results, where its GEMM and its copy were measured."""
    records = [each for each in document.get("records", []) if each["op"] == "ceiling"]
    found = {each["implementation"]: each["per_second"] for each in records if "per_second" in each}
    return Rates(found["gemm"], found["copy"]) if {"gemm", "copy"} <= found.keys() else None


@dataclass(frozen=True)
class Cost:
    """FLOPs of the GEMMs, bytes beside them (a row kernel's times its constant), small kernels."""

    flops: float
    row_bytes: float
    sum_bytes: float
    launches: int

    def ratio(self, rates: Rates) -> float:
        """The time over that of the GEMMs."""
        gemm = self.flops / rates.flops
        return (
            1
            + ((self.row_bytes + self.sum_bytes) / rates.bytes + self.launches * rates.launch)
            / gemm
        )

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.row_bytes + other.row_bytes,
            self.sum_bytes + other.sum_bytes,
            self.launches + other.launches,
        )


def chunks_of(op: str, sizes: Sizes) -> int:
    """How many chunks the op makes of a case on a GPU, in bfloat16."""
    size = {"rows": sizes["N"], "width": sizes["d"], "vocabulary": sizes.get("V")}
    return nitp_ops.explain(op, **size, dtype=torch.bfloat16, device="cuda").chunks


def cost(op: str, sizes: Sizes, chunks: int | None = None) -> Cost:
    """Forward and backward of one case in bfloat16, every gradient wanted; chunks: instead of those
    of the op."""
    count, n, d = chunks or chunks_of(op, sizes), sizes["N"], sizes["d"]
    if op == "linear_cross_entropy":
        factor = CAPPED if sizes.get("softcap") else CROSS_ENTROPY
        rows, weights, launches = factor * 2 * ITEM * n * sizes["V"], sizes["V"] * d, 8 + 4 * count
    else:
        rows = (SWIGLU * 8 * 4 * d + ALIGNMENT * 3 * d) * ITEM * n
        weights, launches = 12 * d**2, 24 + 7 * count
    summed = (6 + SUM * (2 + 8 * (count - 1))) * weights if count > 1 else 0
    return Cost(OPS[op].flops(sizes), rows, summed, launches)


def overhead_ratio(sizes: Sizes, rates: Rates) -> float:
    """NTP + NITP over NTP, in time."""
    ntp, nitp = (cost(op, sizes) for op in ("linear_cross_entropy", "implicit_token_loss"))
    return (ntp + nitp).ratio(rates) * (ntp + nitp).flops / (ntp.ratio(rates) * ntp.flops)
