"""Every piece of `benchmarks/gpu.sh short` runs on the CPU at toy sizes: no typing error waits for
a GPU."""

import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.cases import OPS
from benchmarks.gpu import run_report
from benchmarks.gpu.short import order, tasks
from benchmarks.gpu.short.kinds import Bench, Records, Rows, Stage
from benchmarks.measure import cuda, profiled
from benchmarks.measure.isolated import Isolated, Lost
from benchmarks.report import environment
from tests.benchmarks.gpu.cpu_in_its_place import stand_in

pytestmark = pytest.mark.programs

TINY = {
    "tokens": 32,
    "hidden": 16,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "intermediate": 32,
    "vocabulary": 96,
}
ON_A_CPU = ("ours", "eager", "eager-float32")


class Here(Isolated):
    """Runs tasks in this process."""

    def run(self, task, names, *, patience, deadline):
        del patience, deadline
        return task(at, list(names)), {}


@pytest.fixture
def cpu_in_its_place(monkeypatch):
    stand_in(monkeypatch)


def at(name):
    del name


@pytest.fixture
def bench():
    return Bench(
        {"ours": Here(), "peers": Here(), "unsloth": Here()},
        time.monotonic() + 60,
        {"machine": {}, "stages": {}, "cases": []},
    )


def toy(sizes):
    """Of a row kernel, of NTP beside NITP, of an op."""
    return {
        name: {"N": 8, "D": 16, "m": 16, "d": 16, "V": 64}.get(name, size)
        for name, size in sizes.items()
    }


ROWS = [piece for piece in order.pieces("9.0") if isinstance(piece, Rows)]


def test_every_row_is_measured_by_who_runs_on_a_cpu(cpu_in_its_place, bench, monkeypatch):
    monkeypatch.setattr(cuda, "attempt", lambda name, task: task())  # what raises is seen
    monkeypatch.setattr(order.cuda_run, "ROUNDS", 2)
    for piece in {(p.case.op, p.case.dtype): p for p in ROWS if p.process == "ours"}.values():
        names = [name for name in piece.names if name in ON_A_CPU]
        small = replace(piece, case=replace(piece.case, sizes=toy(piece.case.sizes), names=names))
        assert small.left(bench.document) == names
        found = small.run(names, bench)
        assert run_report.shown(found["cases"][0])
        assert all("milliseconds" in found["cases"][0]["rows"][name] for name in names), found
        bench.document = run_report.merged(bench.document, {**bench.document, **found})
        assert small.left(bench.document) == []


def test_a_peer_that_cannot_run_here_says_why(cpu_in_its_place, bench):
    for piece in {p.names: p for p in ROWS if p.process != "ours"}.values():
        (name,) = piece.names
        small = replace(piece, case=replace(piece.case, sizes=toy(piece.case.sizes)))
        (case,) = small.run([name], bench)["cases"]
        assert "milliseconds" in case["rows"][name] or case["rows"][name]["skipped"]


def test_every_record_has_what_it_promises(cpu_in_its_place, bench, monkeypatch):
    monkeypatch.setattr(tasks, "COPIED", 64)
    monkeypatch.setattr(tasks, "SQUARE", 8)
    for piece in order.pieces("9.0"):
        # a profiler's, and nvcc's
        if not isinstance(piece, Records) or piece.op in ("counters", "geometry"):
            continue
        if piece.op == "training_step":
            if "liger" in piece.names[0]:
                continue  # runs on a GPU alone
            pytest.importorskip("transformers")
            piece = replace(
                piece, task=partial(piece.task, steps=1, warmup=1, dtype="float32", **TINY)
            )
        if piece.op == "chunk_rows":
            task = partial(tasks.chunks, sizes={"N": 16, "d": 8, "V": 32}, rounds=2, seconds=9)
            piece = replace(piece, task=task, names=("4", "8"))
        found = piece.run(list(piece.names), bench)["records"]
        assert [record["implementation"] for record in found] == list(piece.names)
        assert not [record for record in found if "skipped" in record] and all(
            "milliseconds" in r for r in found
        )
        assert piece.left({"records": found}) == []


def test_stages_are_green_red_or_stopped_and_caches_are_warmed_beside_them(bench):
    warmed = []

    def until_stopped(at, names, stop):
        while not stop.exists():
            time.sleep(0.01)
        warmed.extend(names)

    stage = Stage("test", 9, (sleeper("print('9 passed')"),), (("ours", until_stopped, ("a",)),))
    kept = stage.run(["test"], bench)["stages"]["test"]
    assert (kept["code"], kept["said"], warmed) == (0, "9 passed", ["a"])
    bench.deadline = time.monotonic() + 0.5
    assert (
        replace(stage, steps=(sleeper("import time; time.sleep(60)"),)).run(["test"], bench)[
            "stages"
        ]["test"]["code"]
        == 124
    )


def sleeper(code):
    return order.stages.Step([sys.executable, "-c", code])


def test_compilers_run_beside_the_tests_until_these_end(cpu_in_its_place, monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(tasks, "step", lambda function, inputs: ran.append(len(inputs.leaves)))
    cases = [
        ("implicit_token_loss", {"N": 6, "d": 8}, "bfloat16"),
        ("linear_cross_entropy", {"N": 6, "d": 8, "V": 20}, "bfloat16"),
    ]
    tasks.warm(at, ["ours", "eager-float32"], cases=cases, stop=tmp_path / "stop")
    assert ran == [4, 2, 2]  # NITP has no eager-float32
    tasks.warm(at, ["ours"], cases=cases, stop=tmp_path)
    assert len(ran) == 3
    monkeypatch.setattr(tasks, "step", lambda *_: 1 / 0)
    monkeypatch.setattr(cuda, "settle", lambda: (_ for _ in ()).throw(RuntimeError("CUDA error")))
    with pytest.raises(Lost, match="ours broke the device"):
        tasks.warm(at, ["ours"], cases=cases, stop=tmp_path / "stop")


@pytest.mark.parametrize("kernel", profiled.KERNELS)
def test_what_the_profiler_watches_runs(cpu_in_its_place, kernel):
    with cuda.DEVICE:
        run = profiled.calls(1024)[kernel]()
    run()


def test_counters_are_read_in_bytes_and_nanoseconds(monkeypatch):
    header = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    rows = [
        '"0","k(int)","gpu__time_duration.sum","us","1,250.5"',
        '"0","k(int)","dram__bytes_read.sum","Gbyte","1.05"',
    ]
    found = profiled.parsed("\n".join(["==PROF== Connected", "text of the program", header, *rows]))
    assert found == {"kernel": "k(int)", "nanoseconds": 1250500.0, "bytes_read": 1.05e9}
    assert profiled.parsed("==ERROR== no counters") == {}
    monkeypatch.setattr(profiled.shutil, "which", lambda _: None)
    assert profiled.counters(at, ["ours"], kernel="swiglu_rows strided")["ours"][
        "skipped"
    ].startswith("ImportError: ncu")


def test_the_machine_is_told_with_what_its_library_lacks(monkeypatch):
    assert (
        torch.cuda.is_available() or "sees no GPU" in tasks.about(at, [], commit="abc")["refusal"]
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(environment, "gpu_machine", lambda commit: {"commit": commit})
    monkeypatch.setattr(
        tasks.select, "unavailable_reason", lambda device: f"no code for {device.type}"
    )
    told = tasks.about(at, [], commit="abc")
    assert told["machine"] == {"commit": "abc"} and told["native"] == "no code for cuda"


def test_the_pieces_name_modules_tests_and_ops_that_exist():
    pieces = list(order.pieces("9.0"))
    assert len({piece.name for piece in pieces}) == len(pieces)
    (tests,) = [piece for piece in pieces if isinstance(piece, Stage) and piece.name == "test"]
    assert sum(word.startswith("tests/gpu/test_") for word in tests.steps[0].command) >= 4
    assert {piece.case.op for piece in ROWS} >= set(OPS)
