"""`benchmarks --case memory`: a peak for each implementation, and a page that is what the kept
results say."""

import json

import pytest

from benchmarks import __main__ as command
from benchmarks.measure import process_memory
from benchmarks.report import environment, storage
from benchmarks.suites import gate, memory

ARGUMENTS = ["--case", "memory", "--quick", "--threads", "1"]


@pytest.mark.programs
def test_the_peak_grows_with_what_an_implementation_keeps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gate, "refused", lambda ops: False)
    monkeypatch.setattr(memory, "WAYS", ("eager", "eager-float32", "ours"))
    monkeypatch.setattr(memory, "QUICK", {"toy": {"N": 512, "d": 16, "V": 32768}})
    assert command.main([*ARGUMENTS, "--json", str(tmp_path / "a.json")]) == 0
    (case,) = json.loads((tmp_path / "a.json").read_text())["cases"]
    logits = 512 * 32768 * 2
    peaks = {name: row["peak_bytes"] for name, row in case["rows"].items()}
    assert peaks["eager-float32"] > peaks["eager"] > 2 * logits > peaks["ours"]
    assert case["rows"]["ours"]["gradient_bytes"] == 2 * 16 * (512 + 32768)
    assert f"{peaks['eager'] / 2**20:.0f}" in capsys.readouterr().out


def test_who_cannot_run_is_not_measured_and_says_why(monkeypatch):
    monkeypatch.setattr(process_memory, "available_bytes", lambda: 2**30)
    monkeypatch.setattr(memory, "in_child", lambda *_: pytest.fail("measured"))
    case = memory.measure_case("", memory.CASES["Llama-3's vocabulary"], 1)
    text = memory.table(case)
    assert (
        text.count("| not measured | not measured |")
        == text.count("GiB, 1.0 are available")
        == len(memory.WAYS)
    )


@pytest.mark.parametrize("option", ["--markdown", "--save"])
def test_what_it_does_not_write_is_one_line(option, tmp_path, capsys):
    value = [] if option == "--save" else [str(tmp_path / "x")]
    assert command.main([*ARGUMENTS, option, *value]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_page_is_what_the_kept_results_say():
    path = storage.newest("-memory")
    if path is None:
        assert not memory.PAGE.exists()
        return
    document = json.loads(path.read_text())
    text = memory.page(document, f"../{path.relative_to(environment.ROOT)}")
    assert text == memory.PAGE.read_text()
    document["cases"][0]["rows"]["ours"]["peak_bytes"] = 98765 * 2**20
    assert "98765" in memory.page(document, "")
    assert "dirty" not in path.name and document["machine"]["commit"] in path.name
