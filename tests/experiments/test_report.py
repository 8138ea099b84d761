"""The report of the pretraining example: numbers as the tables hold them, honest errors, a page that loads nothing."""

from __future__ import annotations

import json
import math
import re
import statistics
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.report.tables import Table
from examples import pretrain
from experiments.analysis import results as result
from experiments.analysis import statistics as spread
from experiments.report import hypotheses
from experiments.report import table as grid
from nitp_ops.objectives import parse
from tests.experiments.pretrain_cases import ROOT, arguments, fake, verdicts, write_text
from tests.support.browser import BROWSER, drawn

NAME = "<script>alert('x')</script> & $x^2$"


class Page(HTMLParser):
    """Tags, what they load, and the text between them."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [
            x or "" for name, x in attrs if name in ("src", "href", "xlink:href", "data", "srcset")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of a run on files whose folder has a hostile name."""
    folder = tmp_path_factory.mktemp("text") / NAME.replace("/", "|")
    folder.mkdir()
    out = tmp_path_factory.mktemp("out")
    assert (
        pretrain.main(arguments(write_text(folder), out, "--steps", "8", "--seeds", "0", "1")) == 0
    )
    return out / "report.html", folder


def test_the_page_loads_nothing_runs_nothing_and_every_tag_closes(page):
    content = page[0].read_text()
    parsed = Page(content)
    assert parsed.open == [] and {"svg", "table", "details"} <= set(parsed.tags)
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(parsed.tags)
    assert parsed.loads and all(target.startswith("#") for target in parsed.loads)
    style = re.search(r"<style>.*?</style>", content, re.S)
    assert (
        style and "url(" not in style[0] and "@import" not in style[0] and "light dark" in style[0]
    )
    assert not re.search(r"url\((?!#)", content)
    assert "currentColor" in content and "#0a0b0c" not in content


@pytest.mark.skipif(BROWSER is None, reason="no chromium")
def test_the_page_opens_from_the_disk_in_a_browser(page, tmp_path):
    assert drawn(page[0], tmp_path / "report.png")


def test_what_came_from_the_user_is_text_on_the_page(page):
    parsed = Page(page[0].read_text())
    assert str(page[1]) in parsed.text and "script" not in parsed.tags


def test_the_page_holds_the_tables_the_specs_the_machine_and_the_disclaimer(page):
    parsed = Page(page[0].read_text())
    for said in (
        "torch 2",
        " thread",
        "No benchmark is measured here",
        "8 steps of 64 tokens, seeds 0, 1",
    ):
        assert said in parsed.text, said
    spec = json.dumps(parse("ntp + nitp").to_dict(), indent=2)
    assert spec in parsed.text and "parameters added" in parsed.text
    for name in (
        "cross-entropy, nats a byte",
        "j = 8",
        "most frequent token",
        "mean ± standard deviation over 2 seeds",
    ):
        assert name in parsed.text, name
    assert not re.search(r"\bnan\b", parsed.text)


def test_a_cell_is_the_mean_and_the_standard_deviation_over_seeds():
    group = [fake("ntp", seed, cross_entropy=x) for seed, x in enumerate((1.0, 2.0, 4.0))]
    cell = grid.cell(result.CROSS_ENTROPY, group)
    assert cell == f"{7 / 3:.4f} ± {statistics.stdev((1.0, 2.0, 4.0)):.4f}"
    assert grid.cell(result.CROSS_ENTROPY, group[:1]) == "1.0000"
    assert grid.cell(result.LOSS, group) == "-"
    collapsed = [fake("nitp", 0, **{"nitp/skill": math.nan}), fake("nitp", 1)]
    assert (
        grid.cell(result.SKILL, collapsed) == "-" and grid.cell(result.LOSS, collapsed) == "0.2500"
    )


def test_results_of_one_arm_stand_together_in_the_order_of_seeds():
    mixed = [fake("b", 1), fake("a", 0), fake("b", 0), fake("a", 1)]
    assert [[(o.arm.name, o.seed) for o in group] for group in grid.by_arm(mixed)] == [
        [("b", 0), ("b", 1)],
        [("a", 0), ("a", 1)],
    ]


def test_many_arms_are_rows_and_few_are_columns():
    few, many = ([[fake(f"arm {index}", 0)] for index in range(count)] for count in (2, 9))
    assert grid.measured(few, (result.RANK,)).header == ["", "arm 0", "arm 1"]
    assert grid.measured(many, (result.RANK,)).header == ["", "effective rank"]
    assert grid.measured(few, (result.RANK,), wide=True).header == ["", "effective rank"]


def test_a_markdown_table_keeps_bars_inside_cells_and_aligns_numbers_right():
    table = Table("t", ["", "|z|", "word"], [["a|b", "1.5 ± 0.1", "x"], ["c", "-", "2"]])
    lines = table.as_markdown().splitlines()
    assert lines == [
        "**t**",
        "",
        "|  | \\|z\\| | word |",
        "| --- | ---: | --- |",
        "| a\\|b | 1.5 ± 0.1 | x |",
        "| c | - | 2 |",
    ]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.floats(-2, 2))
def test_a_difference_is_paired_by_seed_and_its_spread_knows_no_common_part(common, shift):
    noise = [0.01 * (-1) ** index for index in range(len(common))]
    other = [x + shift + e for x, e in zip(common, noise, strict=True)]
    found = spread.Difference.between(common, other)
    assert found.mean == pytest.approx(shift + statistics.fmean(noise), abs=1e-9)
    assert found.deviation == pytest.approx(statistics.stdev(noise), abs=1e-9)


def test_from_five_pairs_on_a_difference_has_students_interval_and_below_none():
    assert spread.ninety_five(3) == pytest.approx(4.302653, abs=1e-6)
    assert spread.ninety_five(5) == pytest.approx(2.776445, abs=1e-6)
    assert spread.ninety_five(30) == pytest.approx(2.045230, abs=1e-6)
    five = spread.Difference(mean=0.5, deviation=1.0, pairs=5)
    assert (
        five.half_width == pytest.approx(2.776445 / 5**0.5, abs=1e-6)
        and five.formatted(".2f") == "+0.50 ± 1.24"
    )
    assert spread.shown_as(5) == "95 % interval" and spread.no_verdict(5) == ""
    four = spread.Difference(mean=0.5, deviation=1.0, pairs=4)
    assert four.half_width == 1.0 and spread.shown_as(4) == "two standard errors"
    assert "with 4 a 95 % interval (Student's t) is ± 3.2 standard errors" in spread.no_verdict(4)
    assert spread.no_verdict(1) == "No verdict below five seeds: one seed has no spread."
    alone = spread.Difference.between([1.0], [2.0])
    assert math.isnan(alone.half_width) and alone.formatted(".2f") == "+1.00"


def test_chance_is_students_t():
    assert spread.chance(2) == pytest.approx(1 - 2 * math.atan(2) / math.pi, abs=1e-9)
    assert spread.chance(3) == pytest.approx(1 - 2 / math.sqrt(6), abs=1e-9)
    assert spread.chance(10**6) == pytest.approx(math.erfc(math.sqrt(2)), abs=1e-6)
    assert math.isnan(spread.chance(1))


def test_a_verdict_needs_five_seeds_and_an_interval_without_zero():
    verdicts_of = [
        ([1.0, 1.1, 1.2], [1.5, 1.61, 1.7], "none below 5 seeds"),
        ([1.0, 1.1, 1.2, 1.3, 1.4], [1.5, 1.61, 1.7, 1.8, 1.93], "higher"),
        ([1.5, 1.61, 1.7, 1.8, 1.93], [1.0, 1.1, 1.2, 1.3, 1.4], "lower"),
        ([1.0, 1.1, 1.2, 1.3, 1.4], [1.1, 1.0, 1.3, 1.2, 1.4], "open"),
    ]
    for first, other, verdict in verdicts_of:
        assert spread.Difference.between(first, other).verdict == verdict


def test_the_differences_of_arms_are_paired_by_seed_and_say_their_error():
    def rows(*other, first=(1.0, 1.1, 1.2)):
        base = [fake("ntp", seed, cross_entropy=x) for seed, x in enumerate(first)]
        nitp = [fake("nitp", seed, cross_entropy=x) for seed, x in enumerate(other)]
        table = hypotheses.differences([base, nitp], wide=True)
        return table.title, table.rows[0][1]

    assert rows(1.5, 1.61, 1.7) == (
        'less "ntp", paired by seed, ± two standard errors',
        "+0.5033 ± 0.0067",
    )
    five = rows(1.5, 1.61, 1.7, 1.8, 1.93, first=(1.0, 1.1, 1.2, 1.3, 1.4))
    assert five == ('less "ntp", paired by seed, ± 95 % interval', "+0.5080 ± 0.0162")
    assert rows(1.25, first=(1.0,))[1] == "+0.2500"


@pytest.mark.parametrize(
    "path",
    [p for p in sorted((ROOT / "docs").glob("*.md")) if p.name != "log.md"],
    ids=lambda path: path.name,
)
def test_no_page_concludes_anything_from_fewer_than_five_seeds(path):
    text = path.read_text()
    counts = [int(n) for n in re.findall(r"\b(\d+) seeds\b", text)]
    if "seeds" in text:
        assert not verdicts(text)
    if counts and min(counts) < 5:
        assert f"No verdict below five seeds: with {min(counts)} a 95 % interval" in text


def test_the_conclusions_of_two_and_three_seeds_are_gone():
    pages = [(ROOT / "docs" / name).read_text() for name in ("evidence.md", "experiments.md")]
    assert not verdicts("".join(pages)) and all(
        "No verdict below five seeds: with" in page for page in pages
    )
