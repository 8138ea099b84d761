"""`benchmarks`: CSV, Markdown and HTML say what the JSON says; both reports open from the disk in a
browser."""

import argparse
import csv
import io
import json
import re

import pytest

from benchmarks.report import environment, page, records
from benchmarks.suites import cpu_run
from tests.support.browser import BROWSER, drawn

pytestmark = pytest.mark.programs

MACHINE = {
    "cpu": "CPU <&> co.",
    "instruction_set": "AVX2",
    "cores": 2,
    "threads": 2,
    "torch": "2.13.0",
    "commit": "0" * 12,
}


def row(milliseconds: float) -> dict:
    def spread(value: float) -> dict:
        return {"median": value, "q25": 0.9 * value, "q75": 1.1 * value}

    times = {
        "milliseconds": spread(milliseconds),
        "times_floor": spread(milliseconds / 3),
        "rounds": 7,
    }
    times |= {"forward_ms": spread(0.6 * milliseconds), "backward_ms": spread(0.4 * milliseconds)}
    times |= {"times_eager": spread(milliseconds / 9), "gflop_per_s": 100.25}
    return times | {
        "peak_bytes": 5 * 2**20 + 1,
        "gradient_bytes": 2**20,
        "error": {"value": 1.5e-3, "hidden": 1e-4},
    }


@pytest.fixture
def document() -> dict:
    floor = {
        key: value
        for key, value in row(3.0).items()
        if key not in ("peak_bytes", "error", "forward_ms", "backward_ms")
    }
    rows = {"floor": floor, "ours": row(3.5), "eager": row(9.0)}
    rows["quack"] = {"skipped": "ModuleNotFoundError: No module named <quack> | really"}
    case = {
        "op": "linear_cross_entropy",
        "name": "GPT-2",
        "sizes": {"N": 2, "d": 3, "V": 5},
        "dtype": "bfloat16",
    }
    case |= {"flops": 180, "least_bytes": 84, "malloc": "default"}
    losing = {"floor": floor, "ours": row(11.0), "eager": row(9.0)}
    return {
        "machine": MACHINE,
        "quick": True,
        "cases": [{**case, "rows": rows}, {**case, "dtype": "float32", "rows": losing}],
    }


def test_the_csv_holds_every_number_of_the_json_exactly(document):
    first, *lines = records.as_csv(document).splitlines()
    assert first == f"# {environment.machine_line(MACHINE)}"
    found = list(csv.DictReader(io.StringIO("\n".join(lines))))
    assert [each["implementation"] for each in found] == [
        "floor",
        "ours",
        "eager",
        "quack",
        "floor",
        "ours",
        "eager",
    ]
    kept_rows = [row for case in document["cases"] for row in case["rows"].values()]
    for record, kept in zip(found, kept_rows, strict=True):
        if "skipped" in kept:
            assert record["note"] == kept["skipped"] and record["both_ms"] == ""
            continue
        both = kept["milliseconds"]
        assert [float(record[f"both_{key}"]) for key in ("ms", "q25_ms", "q75_ms")] == list(
            both.values()
        )
        assert float(record["times_floor"]) == kept["times_floor"]["median"]
        assert record["peak_bytes"] == str(kept.get("peak_bytes", ""))
        assert record["error"] == ("" if "error" not in kept else str(max(kept["error"].values())))
        assert (record["flops"], record["least_bytes"], record["case"]) == ("180", "84", "GPT-2")


def test_the_markdown_holds_the_same_rows_the_losing_ones_and_the_reasons(document):
    text = records.as_markdown(document)
    assert environment.machine_line(MACHINE) in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 * 2 + 7
    assert "| ours | 2.1 | 1.4 | 3.5 | 1.17 | 0.39 | 5 | 1.5e-03 |" in lines
    assert "| ours | 6.6 | 4.4 | 11 | 3.67 | 1.22 | 5 | 1.5e-03 |" in lines
    assert "* quack: ModuleNotFoundError: No module named <quack> | really" in text
    assert "| quack | - | - | - | - | - | - | - |" in lines


def test_the_html_holds_the_same_cells_escaped_and_loads_nothing(document):
    text = page.render(document)
    for cell in ("2.1", "3.67", "1.5e-03", "linear_cross_entropy GPT-2 N=2 d=3 V=5 bfloat16"):
        assert f">{cell}" in text
    assert (
        "CPU &lt;&amp;&gt; co." in text and "named &lt;quack&gt;" in text and "<quack>" not in text
    )
    assert (
        text.count('<td class="text">slower</td>')
        == text.count('<td class="text">not slower</td>')
        == 1
    )
    assert not re.search(r"<(script|link|img|iframe)\b", text) and not re.search(
        r"url\((?!#)", text
    )
    assert "currentColor" in text and "#0a0b0c" not in text


def test_every_format_is_written_where_the_option_says(document, tmp_path):
    cpu_run.write(
        argparse.Namespace(
            save=False, **{kind: tmp_path / f"a.{kind}" for kind in cpu_run.WRITERS}
        ),
        document,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.csv",
        "a.html",
        "a.json",
        "a.markdown",
    ]
    assert json.loads((tmp_path / "a.json").read_text()) == document


@pytest.mark.skipif(BROWSER is None, reason="no chromium")
def test_the_page_opens_from_the_disk_in_a_browser(document, tmp_path):
    (tmp_path / "run.html").write_text(page.render(document))
    assert drawn(tmp_path / "run.html", tmp_path / "run.png")
