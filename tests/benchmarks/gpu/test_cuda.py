"""`benchmarks --device cuda` without a GPU: refusals, processes that die alone, floors, errors,
cases."""

import os
import time

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from benchmarks import __main__ as command
from benchmarks.cases import OPS
from benchmarks.gpu import cuda_run, run_report, stages
from benchmarks.implementations import EAGER
from benchmarks.measure import cpu, cuda
from benchmarks.measure.isolated import Isolated, Lost, MeasurementError, without_the_dead
from benchmarks.report import environment, storage
from benchmarks.suites import overhead, row_kernels
from nitp_ops.kernels import table
from tests.benchmarks.gpu.cpu_in_its_place import stand_in

pytestmark = pytest.mark.programs


@pytest.fixture
def cpu_in_its_place(monkeypatch):
    stand_in(monkeypatch)


def at(name):
    del name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda", "--quick"], "--quick is for --device cpu"),
        (["--op", "nitp_over_ntp"], "nitp_over_ntp is measured with --device cuda only"),
        (["--device", "cuda", "--base", "HEAD"], "--base is for --device cpu"),
    ],
)
def test_options_of_one_device_are_refused_on_the_other(arguments, message):
    assert message in (command.check(command.parser().parse_args(arguments)) or "")


def of_process(at, names):
    return os.getpid()


def named(at, names):
    """A task for `without_the_dead`: some names do to its process what they say."""
    for name in names:
        at(name)
        if name == "breaks":
            raise Lost("breaks broke the device")
        if name == "exits":
            os._exit(7)  # at once: a busy machine may take seconds to unload torch
        if name == "hangs":
            time.sleep(60)
        if name == "nobody":
            at(None)
            raise ValueError("of nobody")
    return names


def test_a_name_that_dies_hangs_or_breaks_the_device_costs_only_itself():
    names = ["good", "breaks", "exits", "hangs", "last"]
    done, reasons = without_the_dead(named, names, patience=5.0, deadline=time.monotonic() + 200)
    assert done == ["good", "last"]
    assert reasons["breaks"] == "breaks broke the device"
    assert (
        "ended with code 7" in reasons["exits"]
        and "stopped: no answer within 5 s" in reasons["hangs"]
    )


def test_a_failure_of_nobody_and_a_passed_deadline_are_errors():
    with pytest.raises(MeasurementError, match="ValueError: of nobody"):
        without_the_dead(named, ["nobody"], patience=60, deadline=time.monotonic() + 60)
    with pytest.raises(MeasurementError, match="stopped"):
        without_the_dead(named, ["good"], patience=60, deadline=time.monotonic() - 1)


def test_a_case_that_nobody_survives_keeps_its_rows_and_says_why():
    case = cuda_run.Case("swiglu", {"N": 2, "m": 3}, "float32", ["ours", "eager"], named)
    with Isolated() as process:
        kept = cuda_run.measured(case, case.names, {}, time.monotonic() - 1, process)
    assert list(kept["rows"]) == ["ours", "eager"]
    assert all("stopped" in row["skipped"] for row in kept["rows"].values())


def test_an_implementation_that_hung_once_is_not_waited_for_again():
    asked = []

    class Fake(Isolated):
        def run(self, task, names, *, patience, deadline):
            asked.append(list(names))
            return {name: {} for name in names if name != "quack"}, {
                "quack": "stopped: no answer within 150 s"
            }

    case, hung = cuda_run.Case("swiglu", {"N": 2, "m": 3}, "float32", ["ours", "quack"], named), {}
    for _ in range(2):
        kept = cuda_run.measured(case, case.names, hung, 0.0, Fake())
        assert "stopped" in kept["rows"]["quack"]["skipped"]
    assert asked == [["ours", "quack"], ["ours"]]


@pytest.mark.parametrize("op", OPS)
def test_a_case_has_time_floor_error_and_peak_of_everybody(cpu_in_its_place, op):
    names = ["ours", "ours-triton", "eager"]
    rows = cuda.measure_case(
        at, names, op=op, sizes=OPS[op].toy, dtype="float32", rounds=3, seconds=9
    )
    assert list(rows) == ["floor", *names]
    assert "skipped" in rows["ours-triton"]
    for name in ("ours", "eager"):
        assert rows[name]["rounds"] == 3 and rows[name]["peak_bytes"] == 250
        assert 0 < max(rows[name]["error"].values()) < 1e-4
        assert rows[name]["milliseconds"]["median"] > 0 and "times_floor" in rows[name]
    assert rows["eager"]["times_eager"]["median"] == rows["floor"]["times_floor"]["median"] == 1


def test_the_exact_values_in_chunks_are_those_of_the_whole(monkeypatch):
    op = OPS["linear_cross_entropy"]
    inputs = op.inputs({"N": 10, "d": 4, "V": 20}, torch.float32)
    monkeypatch.setattr(cuda, "EXACT_ROWS", 3)
    chunked = cuda.exact_values(op, inputs)
    whole = cpu.value_and_gradients(EAGER[op.name], inputs.to(torch.float64))
    assert max(cpu.relative(chunked, whole).values()) < 1e-12 and set(chunked) == set(whole)


@pytest.mark.parametrize(
    ("host", "each", "count"),
    [(0.0, 0.75e-3, 8), (0.0, 0.47e-3, 13), (5e-3, 0.47e-3, 22), (9.0, 0.5e-3, 40), (0.0, 1.0, 1)],
)
def test_the_writes_before_a_run_last_as_long_as_the_host_needs(host, each, count):
    assert cuda.flushes(host, each) == count


def test_no_case_is_behind_the_limit_of_compilations():
    """dynamo compiles a function for eight sizes and then runs it as it is: its time would stand
    under "compile"."""
    counter, sizes = CompileCounter(), range(2, 14)
    compiled = torch.compile(EAGER["swiglu"], backend=counter, dynamic=False)
    for size in sizes:
        compiled(torch.ones(size, 3), torch.ones(size, 3))
    assert counter.frame_count == len(sizes)


def test_a_process_serves_many_tasks_and_starts_again_after_a_loss():
    with Isolated() as process:
        options = {"patience": 30.0, "deadline": time.monotonic() + 120}
        first, _ = process.run(of_process, ["a"], **options)
        assert process.run(of_process, ["b"], **options)[0] == first
        assert process.run(named, ["good", "exits"], **options)[0] == ["good"]
        again, reasons = process.run(of_process, ["a"], **options)
        assert again != first and not reasons
        with pytest.raises(MeasurementError, match="ValueError: of nobody"):
            process.run(named, ["nobody"], **options)


def test_an_implementation_with_wrong_results_has_no_time(cpu_in_its_place, monkeypatch):
    monkeypatch.setattr(cuda, "function_of", lambda *_: lambda gate, up: (gate + 9) * up)
    rows = cuda.measure_case(
        at, ["ours"], op="swiglu", sizes=OPS["swiglu"].toy, dtype="float32", rounds=2, seconds=9
    )
    assert rows["ours"]["skipped"].startswith("ArithmeticError: value is wrong: relative error")
    assert "milliseconds" not in rows["ours"]


def test_a_broken_device_ends_the_process(monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(cuda, "settle", broken)
    with pytest.raises(Lost, match="quack broke the device: RuntimeError: CUDA error: an illegal"):
        cuda.attempt("quack", broken)


def test_the_floor_runs_every_product_and_is_its_faster_form(cpu_in_its_place, monkeypatch):
    called, product = [], torch.mm
    with monkeypatch.context() as patch:
        patch.setattr(
            torch,
            "mm",
            lambda a, b, out: called.append((len(a), b.shape[1])) or product(a, b, out=out),
        )
        (form,) = runs = cuda.product_runs([(4, 3, 5), (4, 5, 2)], torch.float32)
        runs[form]()
    assert called == [(4, 5), (4, 3), (5, 3), (4, 2), (4, 5), (2, 5)] and form == "float32"
    forms = {"bfloat16": lambda: time.sleep(0.02), "float32": lambda: time.sleep(0.001)}
    monkeypatch.setattr(cuda, "floor_of", lambda *_: forms)
    rows = cuda.measure_case(
        at, [], op="swiglu", sizes=OPS["swiglu"].toy, dtype="float32", rounds=3, seconds=9
    )
    found = rows["floor"]["forms_ms"]
    assert found["bfloat16"] > found["float32"] == rows["floor"]["milliseconds"]["median"]


@pytest.mark.parametrize("kernel", row_kernels.KERNELS)
def test_a_row_kernel_moves_its_arguments_once_each(cpu_in_its_place, kernel):
    # others: what they overwrite
    numbers = {"swiglu_rows": 3, "swiglu_rows_backward_": 5, "alignment_rows_": 3}
    own = {
        "accumulate_rows_": 4 * 16 * (2 * 4 + 2),
        "prepare_rows_": 4 * (2 * 8 + 4 * 4),
        "finish_rows_": 4 * 2 * 4,
    }
    expected = own.get(kernel, 4 * 16 * 2 * numbers.get(kernel, 2))
    assert table.all_kernels()[kernel].sample(4, 16, torch.bfloat16).moved == expected
    rows = row_kernels.measure_kernel(
        at, ["ours"], kernel=kernel, sizes={"N": 4, "D": 16}, dtype="bfloat16", rounds=2, seconds=9
    )
    assert rows["floor"]["bytes"] == expected and rows["ours"]["times_floor"]["median"] > 0


def test_nitp_over_ntp_stands_beside_the_ratio_of_flops(cpu_in_its_place):
    (sizes,) = overhead.CASES
    assert overhead.prediction(sizes) == pytest.approx(1 + 12 * 1280 / 152064, rel=1e-12)
    toy = {"N": 8, "d": 16, "V": 64}
    rows = overhead.measure_overhead(
        at, ["ours", "ours-triton"], sizes=toy, dtype="float32", rounds=3, seconds=9
    )
    assert rows["ours"]["over_ntp"]["median"] > 0 and rows["ours"]["rounds"] == 3
    assert "skipped" in rows["ours-triton"]
    case = {"op": overhead.NAME, "sizes": toy, "dtype": "float32", "rows": rows, "prediction": 1.25}
    assert "1.250" in run_report.shown(case).splitlines()[3]


@pytest.mark.parametrize(
    ("commit", "stages", "green"),
    [
        ("abc", {"test": {"code": 0}}, True),
        ("abc", {"test": {"code": 1}}, False),
        ("abc", {"build": {"code": 0}}, False),
        ("abc-dirty", {"test": {"code": 0}}, False),  # who knows what the tree was then
    ],
)
def test_tests_that_were_green_on_this_commit_are_not_run_again(
    tmp_path, monkeypatch, commit, stages, green
):
    info = {"gpu": "Some GPU", "commit": commit, "torch": "2"}
    monkeypatch.setattr(environment, "gpu_machine", lambda known: dict(info))
    assert not run_report.tests_are_green(None, tmp_path)
    run_report.keep(
        storage.results_path(info, tmp_path), {"machine": info, "stages": stages, "cases": []}
    )
    assert run_report.tests_are_green(None, tmp_path) is green
    monkeypatch.setattr(environment, "gpu_machine", lambda known: info | {"torch": "3"})
    assert not run_report.tests_are_green(None, tmp_path)


def test_the_cases_are_those_of_the_plan():
    found = [
        (case.op, *case.sizes.values(), case.dtype)
        for case in cuda_run.cases(list(cuda_run.SUBJECTS), None)
    ]
    assert ("linear_cross_entropy", 4096, 4096, 128256, "bfloat16") in found
    assert ("implicit_token_loss", 8192, 4096, "bfloat16") in found
    assert ("nitp_over_ntp", 16384, 1280, 152064, "bfloat16") in found
    assert {dtype for op, *_, dtype in found if op == "alignment_rows_"} == {"bfloat16", "float32"}
    for kernel in ("accumulate_rows_", "prepare_rows_", "finish_rows_"):
        assert {dtype for op, *_, dtype in found if op == kernel} == {"bfloat16"}
    named = [subject for subjects in stages.SUBJECTS.values() for subject in subjects]
    assert sorted(named) == sorted(cuda_run.SUBJECTS)
