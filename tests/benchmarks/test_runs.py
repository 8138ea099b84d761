"""`benchmarks`: floors that do the op's own work, fair rounds, true memory, no numbers from red
ops."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import __main__ as command
from benchmarks.cases import OPS
from benchmarks.implementations import forward, step
from benchmarks.measure import cpu
from benchmarks.report import environment, printed, storage
from benchmarks.suites import cpu_run, gate

pytestmark = pytest.mark.programs


ROOT = Path(__file__).resolve().parents[2]


class Work(TorchDispatchMode):
    """Counts GEMMs, their FLOPs, and the numbers that `copy_` moves."""

    def __init__(self) -> None:
        super().__init__()
        self.gemms = self.flops = self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.gemms, self.flops = self.gemms + 1, self.flops + 2 * left.numel() * right.shape[1]
        if name == "copy_":
            self.moved += 2 * args[0].numel()
        return func(*args, **(kwargs or {}))


def work(run: Callable[[], object]) -> Work:
    with Work() as counted:
        run()
    return counted


@pytest.mark.parametrize(
    ("name", "gemms", "pairs_lost"), [("linear_cross_entropy", 3, 0), ("implicit_token_loss", 9, 1)]
)
def test_the_floor_of_a_gemm_bound_op_does_the_gemms_of_eager(name, gemms, pairs_lost):
    op = OPS[name]
    inputs = op.inputs(op.toy, torch.float32)
    eager = work(lambda: step(forward(name, "eager"), inputs))
    floor = work(op.floor({**op.toy, "N": op.toy["N"] - pairs_lost}, torch.float32))
    assert floor.gemms == eager.gemms == gemms
    assert floor.flops == eager.flops


@pytest.mark.parametrize(
    ("name", "forward_moves", "backward_moves"), [("swiglu", 3, 5), ("alignment", 2, 3)]
)
def test_the_floor_of_a_memory_bound_op_moves_what_it_must_touch(
    name, forward_moves, backward_moves
):
    op = OPS[name]
    numbers = next(iter(op.inputs(op.toy, torch.float32).leaves.values())).numel()
    assert work(op.floor(op.toy, torch.float32)).moved == (forward_moves + backward_moves) * numbers


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_ours_and_eager_compute_the_reference_with_a_gradient_for_every_leaf(op, dtype, bound):
    errors = cpu.errors(op, op.toy, dtype, ["ours", "eager"])
    leaves = op.inputs(op.toy, dtype).leaves
    for parts in errors.values():
        assert set(parts) == {"value", *(f"gradient of {leaf}" for leaf in leaves)}
        assert 0 <= max(parts.values()) < bound


def test_a_wrong_implementation_has_a_large_error(monkeypatch):
    op = OPS["swiglu"]
    monkeypatch.setattr(cpu, "forward", lambda *_: lambda gate, up: gate * up)
    assert cpu.errors(op, op.toy, torch.float32, ["ours"])["ours"]["value"] > 0.1


def case(ours: float, eager: float, ours_peak: int = 1, eager_peak: int = 2) -> dict:
    def row(milliseconds: float, peak: int) -> dict:
        spread = {"median": milliseconds, "q25": milliseconds, "q75": milliseconds}
        ratio = {key: value / eager for key, value in spread.items()}
        values = {"milliseconds": spread, "times_floor": spread, "times_eager": ratio, "rounds": 3}
        return values | {"peak_bytes": peak * 2**20, "gradient_bytes": 0, "error": {"value": 1e-3}}

    rows = {"floor": {k: v for k, v in row(1.0, 0).items() if k != "peak_bytes"}}
    rows |= {"ours": row(ours, ours_peak), "eager": row(eager, eager_peak)}
    rows["compile"] = {"skipped": "InvalidCxxCompiler: No working C++ compiler found"}
    return {
        "op": "swiglu",
        "sizes": {"N": 2, "m": 3},
        "dtype": "float32",
        "malloc": "default",
        "rows": rows,
    }


def test_every_case_has_a_verdict_on_time_and_on_memory():
    where = "swiglu  N=2 m=3  float32  malloc default"
    assert printed.against_eager([case(1.0, 2.0), case(3.0, 2.0, 6, 4)]).rows == [
        [where, "0.50", "not slower", "1", "2", "not larger"],
        [where, "1.50", "slower", "6", "4", "larger"],
    ]
    assert printed.against_eager([]).rows == []


def test_a_skipped_implementation_keeps_its_row_and_says_why():
    lines = printed.case_table(case(3.0, 2.0)).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["floor", "ours", "eager", "compile"]
    assert lines[6] == "compile skipped: InvalidCxxCompiler: No working C++ compiler found"


def test_a_case_whose_process_dies_keeps_its_rows_and_says_why(monkeypatch):
    monkeypatch.setattr(cpu, "time_case", lambda *_, **__: os._exit(9))
    op = OPS["swiglu"]
    (dead,) = cpu_run.measure_case(
        op, "toy", op.toy, "float32", ["ours"], 1, ["default"], cpu_run.QUICK
    )
    assert "ended with code 9" in dead["rows"]["ours"]["skipped"]


def test_results_are_one_file_a_device_and_commit(tmp_path):
    info = {"cpu": "AMD EPYC (TM) 7B13", "cores": 2, "commit": "0123456789ab"}
    path = storage.results_path(info)
    assert path.relative_to(storage.RESULTS) == Path("amd-epyc-tm-7b13-2-cores/0123456789ab.json")
    storage.write_json(tmp_path / "device" / "a.json", {"machine": info})
    assert json.loads((tmp_path / "device" / "a.json").read_text()) == {"machine": info}
    with pytest.raises(ValueError, match="JSON"):
        storage.write_json(tmp_path / "device" / "a.json", {"value": float("nan")})
    assert os.listdir(tmp_path / "device") == ["a.json"]
    assert json.loads((tmp_path / "device" / "a.json").read_text()) == {"machine": info}


def test_red_or_missing_tests_print_no_numbers(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(cpu_run, "measure_case", lambda *_: pytest.fail("measured"))
    (tmp_path / "tests/ops").mkdir(parents=True)
    assert command.main(["--quick", "--op", "swiglu"]) == 1
    assert "no tests/ops/**/test_*swiglu*.py" in capsys.readouterr().err
    tests = tmp_path / "tests/ops/test_alignment_and_swiglu.py"
    tests.write_text("def test_wrong():\n    assert 1 == 2\n")
    assert command.main(["--quick", "--op", "swiglu"]) == 1
    shown = capsys.readouterr()
    assert "red, no numbers: pytest ended with code 1" in shown.err
    assert "median" not in shown.out
    tests.write_text("def test_right():\n    assert 1 == 1\n")
    assert gate.failed_tests(["swiglu"]) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "softmax"], "invalid choice: 'softmax'"),
        (["--threads", "0"], "--threads is 0, expected at least 1"),
        (["--save", "--op", "swiglu"], "--save keeps whole runs only"),
        (["--csv", "no/such/folder/a.csv"], "--csv is no/such/folder/a.csv, expected a file"),
        (["--case", "scaling", "--base", "HEAD"], "--case scaling stands alone"),
        (["--case", "GPT-5"], "invalid choice: 'GPT-5'"),
        (["--json", "no/such/folder/a.json"], "--json is no/such/folder/a.json, expected a file"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_two(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    shown = capsys.readouterr()
    assert stopped.value.code == 2
    assert message in shown.err
    assert shown.err.count("\n") == 1


TOY_RUN = """
import dataclasses, sys
from benchmarks import __main__ as command, implementations
from benchmarks.cases import OPS

def broken(gate, up):
    raise RuntimeError("cannot run here")

OPS["swiglu"] = dataclasses.replace(OPS["swiglu"], quick={"toy": OPS["swiglu"].toy})
command.cpu_run.gate.failed_tests = lambda ops: None
original = implementations.forward
command.cpu_run.cpu.forward = lambda op, name: broken if name == "compile" else original(op, name)
sys.exit(command.main(["--quick", "--op", "swiglu", "--dtype", "float32", *sys.argv[1:]]))
"""


def test_a_run_prints_the_machine_the_table_and_the_verdict_and_writes_them_as_json(tmp_path):
    path = tmp_path / "results.json"
    arguments = ["--threads", "1", "--malloc", "both", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, "-c", TOY_RUN, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(path.read_text())
    assert done.stdout.splitlines()[0] == environment.machine_line(document["machine"])
    assert set(document["machine"]) == {
        "cpu",
        "instruction_set",
        "cores",
        "threads",
        "torch",
        "commit",
        "date",
    }
    assert "time / eager" in done.stdout and "slower" in done.stdout
    assert "compile skipped: RuntimeError: cannot run here" in done.stdout
    cases = [(case["dtype"], case["malloc"]) for case in document["cases"]]
    assert cases == [("float32", "default"), ("float32", "raised")]
    for measured in document["cases"]:
        names = ["ours", "ours-compiled", "ours-triton", "ours-reference", "eager", "compile"]
        assert list(measured["rows"]) == ["floor", *names]
        assert "BackendError" in measured["rows"]["ours-triton"]["skipped"]
        assert measured["rows"]["ours-reference"]["skipped"].startswith("left out of --quick: ")
        ours = measured["rows"]["ours"]
        assert (
            ours["milliseconds"]["q25"]
            <= ours["milliseconds"]["median"]
            <= ours["milliseconds"]["q75"]
        )
        assert ours["peak_bytes"] >= 0
        assert (
            0
            < ours["forward_ms"]["median"]
            < ours["milliseconds"]["median"] + ours["forward_ms"]["q75"]
        )
        assert set(ours["error"]) == {"value", "gradient of gate", "gradient of up"}
        assert measured["rows"]["compile"]["skipped"] == "RuntimeError: cannot run here"
