"""`benchmarks --case scaling` and `plot`: exponents that are those of the growth, figures that are
true SVG."""

import json
import xml.etree.ElementTree as xml

import pytest

from benchmarks import __main__ as command
from benchmarks.report import environment, plots, storage
from benchmarks.suites import gate, scaling

pytestmark = pytest.mark.programs

SVG = "{http://www.w3.org/2000/svg}"


def points(time, memory):
    """Sizes 2, 4, 8 with these laws."""

    def row(size):
        return {"milliseconds": time(size), "extra_bytes": memory(size)}

    return [{"size": size, "rows": {"ours": row(size), "eager": row(size)}} for size in (2, 4, 8)]


def test_the_exponents_are_those_of_the_laws():
    found = scaling.exponents(points(lambda n: 3.0 * n**2, lambda n: 1000 * n))
    assert found["ours"]["time"] == pytest.approx(2) and found["ours"]["memory"] == pytest.approx(1)
    assert scaling.exponents(points(lambda n: 7.0, lambda n: 0))["eager"] == {
        "time": 0,
        "memory": 0,
    }


def test_who_cannot_run_has_a_reason_and_no_exponent():
    given = points(lambda n: float(n), lambda n: n)
    for point in given:
        point["rows"]["torch-best"] = {"skipped": "ImportError: no such op"}
    assert list(scaling.exponents(given)) == ["ours", "eager"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Measured at toy sizes, by the command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "failed_tests", lambda ops: None)
        path = tmp_path_factory.mktemp("scaling") / "scaling.json"
        arguments = ["--case", "scaling", "--quick", "--threads", "1", "--json", str(path)]
        assert command.main(arguments) == 0
    return json.loads(path.read_text())


def test_a_study_has_every_axis_everybody_the_errors_and_the_roofline(study):
    assert [sweep["axis"] for sweep in study["sweeps"]] == ["N", "V", "d", "heads"]
    for sweep in study["sweeps"]:
        for point in sweep["points"]:
            assert (
                point["rows"]["ours"]["milliseconds"] > 0
                and point["rows"]["ours"]["extra_bytes"] >= 0
            )
        assert set(sweep["exponents"]) >= {"ours", "eager"}
    assert len(study["errors"]["lines"]["nitp_ops"]) == len(study["errors"]["chunks"])
    assert study["roofline"]["gb_per_s"] > 0 and study["roofline"]["gflop_per_s"] > 0


def test_the_plots_are_svg_in_both_themes_and_the_page_names_them(study, tmp_path):
    written = plots.draw(study, "results.json", tmp_path)
    assert len(written) == 2 * len(plots.FIGURES) + 1
    text = (tmp_path / "growth.md").read_text()
    for path in written[:-1]:
        root = xml.fromstring(path.read_text())
        assert root.tag == f"{SVG}svg" and len(list(root.iter(f"{SVG}path"))) > 10
        assert f"plots/{path.name}" in text and "mathdefault" not in path.read_text()
    light, dark = (
        (tmp_path / f"plots/time-{theme}.svg").read_text() for theme in ("light", "dark")
    )
    assert light != dark and plots.THEMES["light"][0] in light and plots.THEMES["dark"][0] in dark
    assert (
        "prefers-color-scheme: dark" in text and environment.machine_line(study["machine"]) in text
    )
    for found in study["sweeps"]:
        assert f"| {found['axis']} | ours | {found['exponents']['ours']['time']:.2f} |" in text


def test_the_same_results_give_the_same_bytes_and_others_do_not(study, tmp_path):
    first, again = (plots.draw(study, "a.json", tmp_path / name)[0].read_bytes() for name in "ab")
    assert first == again
    study = json.loads(json.dumps(study))
    study["sweeps"][0]["points"][0]["rows"]["ours"]["milliseconds"] *= 50
    assert plots.draw(study, "a.json", tmp_path / "c")[0].read_bytes() != first


def test_the_newest_results_are_drawn_and_none_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(storage, "RESULTS", tmp_path)
    assert command.main(["plot"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    for name, date in (("old", "2026-01-01"), ("new", "2026-02-01"), ("undated", None)):
        machine = {"commit": name} | ({"date": date} if date else {})
        storage.write_json(tmp_path / "cpu" / f"{name}-scaling.json", {"machine": machine})
    newest = storage.newest("-scaling")
    assert newest is not None and newest.name == "new-scaling.json"


def test_red_tests_give_no_study(monkeypatch, capsys):
    monkeypatch.setattr(gate, "failed_tests", lambda ops: "pytest ended with code 1")
    monkeypatch.setattr(scaling, "study", lambda *_: pytest.fail("measured"))
    assert command.main(["--case", "scaling"]) == 1
    assert "red, no numbers" in capsys.readouterr().err
