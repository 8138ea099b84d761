"""A run on CPU: the gate, each case against everybody, the tables, and what is written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.cases import OPS, Op, Sizes, heading
from benchmarks.implementations import NAMES, SLOW, names_for
from benchmarks.measure import children, cpu, process_memory
from benchmarks.measure.gemm_times import in_child
from benchmarks.measure.isolated import MeasurementError
from benchmarks.report import environment, page, printed, records, storage
from benchmarks.report.tables import plain

from . import gate

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Effort:
    """Rounds at most, and seconds after which an implementation leaves the rounds."""

    rounds: int
    seconds: float


QUICK, FULL = Effort(rounds=30, seconds=0.9), Effort(rounds=50, seconds=15.0)
#: Option -> what it writes, and how a document becomes that text.
WRITERS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "json": ("JSON", storage.as_json),
    "csv": ("CSV, a row an implementation", records.as_csv),
    "markdown": ("Markdown tables", records.as_markdown),
    "html": ("one self-contained HTML page", page.render),
}


def selected(options: argparse.Namespace) -> Iterator[tuple[Op, str, Sizes]]:
    """(op, case, sizes) of what the options ask for."""
    for op in map(OPS.__getitem__, options.op or OPS):
        for name, sizes in (op.quick if options.quick else op.full).items():
            if name in (options.case or [name]):
                yield op, name, sizes


def measure_case(
    op: Op,
    name: str,
    sizes: Sizes,
    dtype: str,
    names: list[str],
    threads: int,
    mallocs: Sequence[str],
    effort: Effort,
) -> list[dict[str, Any]]:
    """One case a malloc setting; peak memory and errors do not depend on it and are measured once."""
    where = (op, sizes, DTYPES[dtype])
    reason = cpu.lacking(*where, process_memory.available_bytes())
    timing = partial(cpu.time_case, *where, names, rounds=effort.rounds, seconds=effort.seconds)
    cases = []
    for malloc in mallocs:
        try:
            rows = {} if reason else in_child(timing, threads, malloc)
        except MeasurementError as error:
            reason = str(error)
        if reason:
            rows = {each: {"skipped": reason} for each in names}
        cases.append(heading(op, name, sizes, DTYPES[dtype]) | {"malloc": malloc, "rows": rows})
    ran = [each for each in names if any("skipped" not in case["rows"][each] for case in cases)]
    extra = extras(where, ran, threads) if ran else {}
    for case in cases:
        for each in ran:
            case["rows"][each] |= extra[each]
    return cases


def extras(
    where: tuple[Op, Sizes, torch.dtype], names: list[str], threads: int
) -> dict[str, dict[str, Any]]:
    """Error against float64 and peak memory of those who ran, each in a process of its own."""
    extra: dict[str, dict[str, Any]] = {name: {} for name in names}
    # the same formula, and another compilation
    checked = [name for name in names if name != "compile"]
    try:
        for name, error in in_child(partial(cpu.errors, *where, checked), threads).items():
            extra[name]["error"] = error
    except MeasurementError as error:
        print(f"{where[0].name}, error against float64: {error}", file=sys.stderr)
    for name in names:
        try:
            extra[name] |= in_child(partial(cpu.peak_memory, *where, name), threads)
        except MeasurementError as error:
            extra[name]["peak_failed"] = str(error)
    return extra


def run(options: argparse.Namespace) -> int:
    """Measure and print; 1 when tests are red or ours could not be measured."""
    info = environment.machine(options.threads)
    print(environment.machine_line(info), flush=True)
    wanted = list(selected(options))
    if not wanted:
        print("benchmarks: no case has that op and that name, see --list", file=sys.stderr)
        return 2
    if gate.refused(list(dict.fromkeys(op.name for op, _, _ in wanted))):
        return 1
    malloc = options.malloc or ("default" if options.quick else "both")
    mallocs = list(children.MALLOC) if malloc == "both" else [malloc]
    left_out = (
        {name: f"left out of --quick: {why}" for name, why in SLOW.items()} if options.quick else {}
    )
    cases: list[dict[str, Any]] = []
    for op, name, sizes in wanted:
        names = [each for each in names_for(op.name) if each in (options.implementation or NAMES)]
        slow = {
            each: {"skipped": left_out[each]}
            for each in names
            if each in left_out and not options.implementation
        }
        for dtype in options.dtype or DTYPES:
            own = [each for each in names if each not in slow]
            done = measure_case(
                op,
                name,
                sizes,
                dtype,
                own,
                options.threads,
                mallocs,
                QUICK if options.quick else FULL,
            )
            for case in done:
                rows = case["rows"] | slow
                case["rows"] = {each: rows[each] for each in (cpu.FLOOR, *names) if each in rows}
                print(f"\n{printed.case_title(case)}\n{printed.case_table(case)}", flush=True)
            cases += done
    verdicts = printed.against_eager(cases)
    compared = f"\n{plain(verdicts.header, verdicts.rows)}\n" if verdicts.rows else ""
    print(f"\n{printed.legend(cases)}\n{compared}\n{environment.machine_line(info)}")
    write(options, {"machine": info, "quick": options.quick, "cases": cases})
    return int(any("skipped" in case["rows"].get("ours", {}) for case in cases))


def write(options: argparse.Namespace, document: dict[str, Any]) -> None:
    """The files that were asked for."""
    paths = {kind: getattr(options, kind) for kind in WRITERS}
    for kind, path in paths.items():
        if path:
            storage.write(path, WRITERS[kind][1](document))
            print(f"written to {path}")
    if options.save:
        path = storage.results_path(document["machine"], kind="-quick" if options.quick else "")
        storage.write_json(path, document)
        print(f"written to {path}")
