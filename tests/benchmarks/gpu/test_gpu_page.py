"""The measured part of docs/gpu.md: current, from the JSON of GPUs alone, the model beside it, no
dry run."""

from pathlib import Path

import pytest

from benchmarks.gpu import page
from benchmarks.measure import roofline
from benchmarks.report import storage
from benchmarks.suites import training_step

MACHINE = {
    "gpu": "NVIDIA H200", "multiprocessors": 132, "memory_gib": 139.8, "capability": "9.0", "torch": "2.11.0",
    "cuda": "13.0", "triton": "3.6.0", "commit": "0123456789ab",
}  # fmt: skip
HEAD = {"N": 4096, "d": 4096, "V": 128256}


def ratio(value):
    return {"median": value, "q25": value, "q75": value}


def document() -> dict:
    token = {"ours": {"times_floor": ratio(1.054)}, "quack-rows": {"times_floor": ratio(1.031)}}
    token |= {
        "eager": {"times_floor": ratio(1.987)},
        "liger": {"skipped": "ImportError: liger needs liger_kernel"},
    }
    kernel = {"ours": {"times_floor": ratio(1.093)}, "ours-triton": {"times_floor": ratio(1.61)}}
    step = {
        "op": "training_step",
        "case": "Qwen2-0.5B",
        "tokens_per_s": 54321.4,
        "peak_gib": 33.34,
        "ntp_loss": 12.1,
    }
    chunks = {"op": "chunk_rows", "case": "16384x2048x151936"}
    return {
        "machine": MACHINE,
        "stages": {"test": {"code": 0, "seconds": 51.0, "said": "409 passed"}},
        "cases": [
            {"op": "linear_cross_entropy", "sizes": HEAD, "dtype": "bfloat16", "rows": token},
            {
                "op": "linear_cross_entropy",
                "sizes": {**HEAD, "N": 64},
                "dtype": "bfloat16",
                "rows": token,
            },
            {
                "op": "cross_entropy_rows_",
                "sizes": {"N": 4096, "D": 128256},
                "dtype": "bfloat16",
                "rows": kernel,
            },
            {
                "op": "cross_entropy_rows_",
                "sizes": {"N": 4096, "D": 151936},
                "dtype": "float32",
                "rows": kernel,
            },
        ],
        "records": [
            {"op": "ceiling", "case": "copy, GEMM", "implementation": "copy", "per_second": 4.0e12},
            {"op": "ceiling", "case": "copy, GEMM", "implementation": "gemm", "per_second": 7.0e14},
            {**step, "implementation": "ntp"},
            {**chunks, "implementation": "2048", "times_floor": ratio(1.234)},
            {**chunks, "implementation": "4096", "skipped": "OutOfMemoryError: no"},
        ],
    }


@pytest.fixture
def kept(tmp_path) -> Path:
    storage.write_json(storage.results_path(MACHINE, tmp_path), document())
    storage.write_json(tmp_path / "a-cpu" / "1-quick.json", {"machine": {"cpu": "A"}, "cases": []})
    return tmp_path


def lines(text: str, start: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(start)]


def test_the_page_is_current():
    text = page.PAGE.read_text()
    assert page.written(text, page.documents()) == text
    assert text.count(page.BEGIN) == text.count(page.END) == 1


def test_without_results_every_figure_but_the_model_s_is_not_measured():
    text = page.section([])
    for row in lines(text, "| `linear") + lines(text, "| `implicit"):
        assert float(row[3]) > 1 and set(row[4:]) == {"not measured"}
    for objective in training_step.OBJECTIVES:
        assert lines(text, f"| {objective} | ")[0][2:] == ["not measured"] * 3


def test_a_measurement_stands_beside_the_model_at_the_measured_rates(kept):
    found = page.documents(kept)
    text = page.section(found)
    assert len(found) == 1 and "NVIDIA H200" in text and "test green" in text
    assert "Model of this GPU, measured: 700 TFLOP/s, 4.0 TB/s of copy" in text
    model = roofline.cost("linear_cross_entropy", HEAD).ratio(roofline.Rates(7e14, 4e12))
    (row,) = lines(text, "| `linear_cross_entropy` | N = 4096, d = 4096, V = 128256 |")
    # ours, eager, quack-rows: who ran somewhere
    assert row[2:] == ["1", f"{model:.2f}", "1.05", "1.99", "1.03"]
    (other,) = lines(text, "| `linear_cross_entropy` | N = 8192, d = 4096, V = 128256 |")
    assert other[4:] == ["not measured"] * 3
    # a case that is no longer in the list
    assert lines(text, "| `linear_cross_entropy` | N = 64, d = 4096")
    assert "* liger: ImportError: liger needs liger_kernel" in text
    assert lines(text, "| `cross_entropy_rows_` | N = 4096, D = 128256")[0][3:] == ["1.09", "1.61"]
    # float32
    assert (
        lines(text, "| `cross_entropy_rows_` | N = 4096, D = 151936")[0][3:] == ["not measured"] * 2
    )
    model = roofline.cost("linear_cross_entropy", {"N": 16384, "d": 2048, "V": 151936}, 8)
    by_rows = [row[1:] for row in lines(text, "| N = 16384, d = 2048, V = 151936 |")]
    assert by_rows[0] == ["2048", f"{model.ratio(roofline.Rates(7e14, 4e12)):.2f}", "1.23"]
    assert [row[2] for row in by_rows[1:]] == ["x", "not measured", "not measured"]
    assert lines(text, "| ntp | ")[0][2:] == ["54321", "33.3", "12.1000"]


def test_results_of_a_dry_run_are_refused_in_one_line(kept, monkeypatch, capsys):
    fake = {**document(), "fake": True}
    storage.write_json(kept / "dry-run" / "1.json", fake)
    with pytest.raises(storage.DamagedResults, match="a dry run, nothing was measured"):
        page.documents(kept)
    monkeypatch.setattr(page.documents, "__defaults__", (kept,))
    before = page.PAGE.read_text()
    assert page.main() == 1 and page.PAGE.read_text() == before
    assert capsys.readouterr().err.count("\n") == 1
