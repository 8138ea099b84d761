"""`python -m benchmarks --device cuda`: the cases, in a process beside this one, their tables, one
JSON."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.cases import OPS, Sizes, heading
from benchmarks.implementations import names_for
from benchmarks.measure import cuda
from benchmarks.measure.cpu import FLOOR
from benchmarks.measure.isolated import Isolated, MeasurementError
from benchmarks.report import environment
from benchmarks.report.environment import machine_line
from benchmarks.report.storage import results_path
from benchmarks.suites import overhead, row_kernels

from . import run_report

#: What a GPU measures, in the order of the output: row kernels, ops, and NITP over NTP.
SUBJECTS = (*row_kernels.KERNELS, *OPS, overhead.NAME)
#: Seconds without a sign of life after which an implementation is given up (compilers and tuners
#: are slow).
PATIENCE = 150.0
ROUNDS, SECONDS = 20, 3.0


@dataclass(frozen=True)
class Case:
    """What is measured at which sizes, by whom, and the function that does it."""

    op: str
    sizes: Sizes
    dtype: str
    names: list[str]
    measure: Callable[..., dict[str, dict[str, Any]]]
    name: str = ""


def cases(subjects: list[str], dtypes: list[str] | None) -> Iterator[Case]:
    """The cases of these subjects; GEMM-bound ones in bfloat16 unless `dtypes` says otherwise."""
    for subject in subjects:
        named: dict[str, Sizes] = {}
        if subject in row_kernels.KERNELS:
            names, task = row_kernels.NAMES, partial(row_kernels.measure_kernel, kernel=subject)
            sizes, own = row_kernels.KERNELS[subject], row_kernels.dtypes_of(subject)
        elif subject == overhead.NAME:
            names, task, sizes, own = (
                overhead.NAMES,
                overhead.measure_overhead,
                overhead.CASES,
                ["bfloat16"],
            )
        else:
            names, task, named = (
                names_for(subject),
                partial(cuda.measure_case, op=subject),
                OPS[subject].cuda,
            )
            sizes, own = (
                tuple(named.values()),
                ["bfloat16"] if OPS[subject].layers else list(cuda.DTYPES),
            )
        for name, size in zip(named or ("",) * len(sizes), sizes, strict=True):
            for dtype in own if dtypes is None else dtypes:
                if subject not in row_kernels.NARROW or dtype in own:
                    yield Case(subject, size, dtype, names, task, name)


def measured(
    case: Case,
    names: list[str],
    hung: dict[str, str],
    deadline: float,
    process: Isolated,
    patience: float = PATIENCE,
) -> dict[str, Any]:
    """One case as the JSON keeps it; who hung in an earlier case is not waited for again (`hung`,
    added to)."""
    task = partial(case.measure, sizes=case.sizes, dtype=case.dtype, rounds=ROUNDS, seconds=SECONDS)
    wanted = [name for name in names if name not in hung]
    try:
        rows, reasons = process.run(task, wanted, patience=patience, deadline=deadline)
    except MeasurementError as error:
        rows, reasons = {}, dict.fromkeys(wanted, str(error))
    hung |= {
        name: reason for name, reason in reasons.items() if reason.startswith("stopped") and rows
    }
    skipped = {
        name: {"skipped": reason} for name, reason in (hung | reasons).items() if name in names
    }
    ordered = {name: (rows | skipped)[name] for name in (FLOOR, *names) if name in rows | skipped}
    kept = {"op": case.op, "sizes": case.sizes, "dtype": case.dtype, "rows": ordered}
    if case.op in OPS:
        kept |= heading(OPS[case.op], case.name, case.sizes, cuda.DTYPES[case.dtype])
    return kept | (
        {"prediction": overhead.prediction(case.sizes)} if case.op == overhead.NAME else {}
    )


def run(options: argparse.Namespace) -> int:
    """Measure and print; 1 when ours could not be measured."""
    info = environment.gpu_machine(options.commit)
    print(machine_line(info), flush=True)
    deadline, hung = time.monotonic() + options.minutes * 60, {}
    done: list[dict[str, Any]] = []
    path = options.json or results_path(info, options.out)
    with Isolated() as process:
        for case in cases(options.op or list(SUBJECTS), options.dtype):
            names = [name for name in case.names if name in (options.implementation or case.names)]
            done.append(measured(case, names, hung, deadline, process))
            print(f"\n{run_report.shown(done[-1])}", flush=True)
            run_report.keep(path, {"machine": info, "stages": {}, "cases": done[-1:]})
    print(f"\n{run_report.legend(done)}\n\nwritten to {path}\n")
    print(run_report.summary({"machine": info, "stages": {}, "cases": done}))
    lost = [case for case in done if "skipped" in case["rows"].get("ours", {})]
    for case in lost:
        print(
            f"benchmarks: {case['op']}: ours failed: {case['rows']['ours']['skipped']}",
            file=sys.stderr,
        )
    return int(bool(lost))
