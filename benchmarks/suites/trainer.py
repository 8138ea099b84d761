"""`python -m benchmarks --case trainer`: attaching costs nothing but the objective.

A training step (forward and backward) of a random Llama with its own loss, and of the same model
with "ntp" and with "ntp + nitp" attached: seconds as ratios of interleaved rounds in one process,
peak memory in a fresh process each.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import nitp_ops
from benchmarks.measure import children, process_memory, timing
from benchmarks.measure.isolated import MeasurementError
from benchmarks.report import environment, storage, tables

PLAIN = "the model's own loss"
SPECS = {PLAIN: None, "ntp": "ntp", "ntp + nitp": "ntp + 0.8*nitp"}
#: rows, tokens per row, width, blocks, vocabulary
FULL = (
    {"B": 4, "T": 256, "d": 512, "L": 4, "V": 32768},
    {"B": 2, "T": 256, "d": 512, "L": 4, "V": 131072},
)
QUICK = ({"B": 2, "T": 64, "d": 128, "L": 2, "V": 32768},)
DTYPES = ("bfloat16", "float32")
ROUNDS, QUICK_ROUNDS, SECONDS = 9, 5, 60.0
#: Relative: "ntp" and the model's own loss, which forms its log-sum-exp from logits rounded alike.
TOLERANCE = {"bfloat16": 2e-3, "float32": 1e-5}


class Step:
    """Forward and backward of one model on one batch; every call keeps its loss."""

    def __init__(self, name: str, sizes: dict[str, int], dtype: str) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=sizes["V"],
            hidden_size=sizes["d"],
            intermediate_size=4 * sizes["d"],
            num_hidden_layers=sizes["L"],
            num_attention_heads=max(1, sizes["d"] // 64),
            num_key_value_heads=max(1, sizes["d"] // 64),
            use_cache=False,
        )
        self.model = LlamaForCausalLM(config).to(dtype=getattr(torch, dtype)).train()  # type: ignore[reportArgumentType]
        ids = torch.randint(sizes["V"], (sizes["B"], sizes["T"]))
        self.batch = {"input_ids": ids, "labels": ids}
        self.handle = None if (spec := SPECS[name]) is None else nitp_ops.attach(self.model, spec)
        self.loss = 0.0

    def __call__(self) -> None:
        loss = self.model(**self.batch).loss
        loss.backward()
        if self.handle is None:
            self.loss = loss.item()
        else:
            assert self.handle.metrics is not None
            self.loss = self.handle.metrics.compute()["loss/ntp"]

    def clear(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad(set_to_none=True)


def times(sizes: dict[str, int], dtype: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Median milliseconds of each, and ratios to the model's own loss within the rounds.

    Raises:
        AssertionError: an attached model computes another NTP loss than the model itself.
    """
    steps = {name: Step(name, sizes, dtype) for name in SPECS}

    def clear() -> None:
        for step in steps.values():
            step.clear()

    for step in steps.values():
        step()
        clear()
    own = steps[PLAIN].loss
    for name, step in steps.items():
        assert abs(step.loss - own) <= TOLERANCE[dtype] * own, (
            f"{name}: NTP is {step.loss}, expected {own}"
        )
    gc.collect()
    gc.disable()
    runs: dict[str, Callable[[], object]] = dict(steps)
    seconds = timing.interleave(runs, clear, rounds=rounds, seconds=SECONDS)
    return {
        name: {
            "milliseconds": timing.quartiles([1e3 * value for value in values]),
            "times_plain": timing.ratios(values, seconds[PLAIN]),
            "rounds": len(values),
        }
        for name, values in seconds.items()
    }


def peak(sizes: dict[str, int], dtype: str, name: str) -> int:
    """Most bytes of a step above what is resident before it, gradients included."""
    step = Step(name, sizes, dtype)
    return process_memory.peak_of(step, step.clear)


def measure_case(sizes: dict[str, int], dtype: str, threads: int, rounds: int) -> dict[str, Any]:
    """One row each of `SPECS`."""

    def child(task: Callable[[], Any]) -> Any:
        def configured() -> Any:
            children.configure(threads)
            return task()

        return children.in_child(configured)

    rows = child(partial(times, sizes, dtype, rounds))
    for name in SPECS:
        rows[name]["peak_bytes"] = child(partial(peak, sizes, dtype, name))
    return {"sizes": sizes, "dtype": dtype, "rows": rows}


def table(case: dict[str, Any]) -> str:
    """One case as it is printed."""
    rows = []
    for name, row in case["rows"].items():
        ratio = row["times_plain"]
        spread = f"{ratio['median']:.2f} ({ratio['q25']:.2f} to {ratio['q75']:.2f})"
        rows.append(
            (
                name,
                f"{row['milliseconds']['median']:.0f}",
                spread,
                f"{row['peak_bytes'] / 2**20:.0f}",
            )
        )
    title = f"{case['dtype']}, " + " ".join(
        f"{key}={value}" for key, value in case["sizes"].items()
    )
    return f"\n{title}\n" + tables.plain(
        ("", "ms a step", "times the model's own loss", "peak MiB"), rows
    )


def run(options: argparse.Namespace) -> int:
    """Measure, print, write; 1 when a model could not be measured or computes another loss."""
    if options.csv or options.markdown or options.html:
        print("benchmarks: --case trainer writes --json and --save", file=sys.stderr)
        return 2
    info = environment.machine(options.threads)
    print(environment.machine_line(info), flush=True)
    cases = []
    for sizes in QUICK if options.quick else FULL:
        for dtype in options.dtype or DTYPES:
            try:
                cases.append(
                    measure_case(
                        sizes, dtype, options.threads, QUICK_ROUNDS if options.quick else ROUNDS
                    )
                )
            except MeasurementError as error:
                print(f"benchmarks: trainer, {dtype}, {sizes}: {error}", file=sys.stderr)
                return 1
            print(table(cases[-1]), flush=True)
    document = {"machine": info, "quick": options.quick, "study": "trainer", "cases": cases}
    for path in (
        options.json,
        storage.results_path(info, kind="-trainer") if options.save else None,
    ):
        if path:
            storage.write_json(path, document)
            print(f"written to {path}")
    return 0
