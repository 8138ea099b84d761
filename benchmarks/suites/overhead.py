"""What NITP adds to NTP on the loss part alone, beside the ratio of their GEMMs' FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

import nitp_ops
from benchmarks.cases import OPS, Inputs, Sizes
from benchmarks.measure import cuda, timing
from benchmarks.measure.isolated import At

NAME = "nitp_over_ntp"
WEIGHT = 0.8
CASES: tuple[Sizes, ...] = ({"N": 16384, "d": 1280, "V": 152064},)
NAMES = ["ours", "ours-triton", "eager", "compile"]
NTP = ("hidden", "unembedding", "labels")
NITP = ("hidden", "target", "gate", "up", "down")


def prediction(sizes: Sizes) -> float:
    """1 + 72 d^2 / (6 d V): the FLOPs of both losses over those of the first."""
    ntp = nitp_ops.explain(
        "linear_cross_entropy", rows=1, width=sizes["d"], vocabulary=sizes["V"]
    ).flops
    return 1 + nitp_ops.explain("implicit_token_loss", rows=1, width=sizes["d"]).flops / ntp


def inputs_of(sizes: Sizes, dtype: str) -> Inputs:
    """One hidden state for both losses."""
    ntp, nitp = (
        OPS[op].inputs(sizes, cuda.DTYPES[dtype])
        for op in ("linear_cross_entropy", "implicit_token_loss")
    )
    return Inputs({**nitp.arguments, **ntp.arguments})


def measure_overhead(
    at: At, names: list[str], *, sizes: Sizes, dtype: str, rounds: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """By name: milliseconds of NTP alone, of both, and the ratio within rounds."""
    with cuda.DEVICE:
        inputs = inputs_of(sizes, dtype)
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], object]] = {}
    for name in names:
        at(name)
        token, latent = (
            cuda.function_of(op, name) for op in ("linear_cross_entropy", "implicit_token_loss")
        )

        def ntp(token: Callable[..., Tensor] = token) -> Tensor:
            return token(*(inputs.arguments[each] for each in NTP))

        def both(ntp: Callable[[], Tensor] = ntp, latent: Callable[..., Tensor] = latent) -> Tensor:
            return ntp() + WEIGHT * latent(*(inputs.arguments[each] for each in NITP))

        pair = {f"{name} ntp": partial(_step, ntp), f"{name} both": partial(_step, both)}
        found[name] = cuda.attempt(name, partial(_once, pair, inputs))
        inputs.clear()
        if "skipped" not in found[name]:
            runs |= pair
    at(None)
    times = cuda.timed(runs, inputs.clear, rounds, seconds) if runs else {}
    for name in (each.removesuffix(" ntp") for each in runs if each.endswith(" ntp")):
        ntp_times, both_times = times[f"{name} ntp"], times[f"{name} both"]
        found[name] |= {
            "ntp_ms": timing.quartiles([1e3 * t for t in ntp_times]),
            "milliseconds": timing.quartiles([1e3 * t for t in both_times]),
            "over_ntp": timing.ratios(both_times, ntp_times),
            "rounds": len(both_times),
        }
    return found


def _step(loss: Callable[[], Tensor]) -> None:
    loss().backward()


def _once(runs: Mapping[str, Callable[[], object]], inputs: Inputs) -> dict[str, Any]:
    for run in runs.values():
        inputs.clear()
        run()
    return {}
