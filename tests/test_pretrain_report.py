"""The report of the pretraining example: numbers as the tables hold them, honest spreads, a page that loads nothing."""

from __future__ import annotations

import importlib
import json
import math
import re
import statistics
from html.parser import HTMLParser

import pytest
from browser import BROWSER, drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from pretrain_cases import arguments, fake, pretrain, write_text

from nitp_ops.objectives import parse

grid = importlib.import_module("pretraining.grid")
outcome = importlib.import_module("pretraining.outcome")
sentences = importlib.import_module("pretraining.sentences")
spread = importlib.import_module("pretraining.spread")

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
        self.loads += [x or "" for name, x in attrs if name in ("src", "href", "xlink:href", "data", "srcset")]
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
    assert pretrain.main(arguments(write_text(folder), out, "--steps", "8", "--seeds", "0", "1")) == 0
    return out / "report.html", folder


def test_the_page_loads_nothing_runs_nothing_and_every_tag_closes(page):
    content = page[0].read_text()
    parsed = Page(content)
    assert parsed.open == [] and {"svg", "table", "details"} <= set(parsed.tags)
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(parsed.tags)
    assert parsed.loads and all(target.startswith("#") for target in parsed.loads)
    style = re.search(r"<style>.*?</style>", content, re.S)
    assert style and "url(" not in style[0] and "@import" not in style[0] and "light dark" in style[0]
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
    for said in ("torch 2", " thread", "No benchmark is measured here", "8 steps of 64 tokens, seeds 0, 1"):
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
    cell = grid.cell(outcome.CROSS_ENTROPY, group)
    assert cell == f"{7 / 3:.4f} ± {statistics.stdev((1.0, 2.0, 4.0)):.4f}"
    assert grid.cell(outcome.CROSS_ENTROPY, group[:1]) == "1.0000"
    assert grid.cell(outcome.LOSS, group) == "-"
    collapsed = [fake("nitp", 0, **{"nitp/skill": math.nan}), fake("nitp", 1)]
    assert grid.cell(outcome.SKILL, collapsed) == "-" and grid.cell(outcome.LOSS, collapsed) == "0.2500"


def test_outcomes_of_one_arm_stand_together_in_the_order_of_seeds():
    mixed = [fake("b", 1), fake("a", 0), fake("b", 0), fake("a", 1)]
    assert [[(o.arm.name, o.seed) for o in group] for group in grid.by_arm(mixed)] == [
        [("b", 0), ("b", 1)],
        [("a", 0), ("a", 1)],
    ]


def test_many_arms_are_rows_and_few_are_columns():
    few, many = ([[fake(f"arm {index}", 0)] for index in range(count)] for count in (2, 9))
    assert grid.results(few, (outcome.RANK,)).header == ["", "arm 0", "arm 1"]
    assert grid.results(many, (outcome.RANK,)).header == ["", "effective rank"]
    assert grid.results(few, (outcome.RANK,), wide=True).header == ["", "effective rank"]


def test_a_markdown_table_keeps_bars_inside_cells_and_aligns_numbers_right():
    lines = grid.Grid("t", ["", "|z|", "word"], [["a|b", "1.5 ± 0.1", "x"], ["c", "-", "2"]]).as_markdown().splitlines()
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


def test_the_pairs_needed_bring_two_standard_errors_down_to_the_difference():
    found = spread.Difference(mean=0.01, deviation=0.05, pairs=3)
    assert not found.outside and found.pairs_needed == 100
    assert spread.Difference(0.01, 0.05, 100).two_errors == pytest.approx(0.01)
    assert spread.Difference(0.01, 0.05, 101).outside
    assert spread.Difference(0.0, 0.05, 3).pairs_needed == math.inf
    alone = spread.Difference.between([1.0], [2.0])
    assert math.isnan(alone.pairs_needed) and not alone.outside and alone.spelled(".2f") == "+1.00"


def test_chance_is_students_t():
    assert spread.chance(2) == pytest.approx(1 - 2 * math.atan(2) / math.pi, abs=1e-9)
    assert spread.chance(3) == pytest.approx(1 - 2 / math.sqrt(6), abs=1e-9)
    assert spread.chance(10**6) == pytest.approx(math.erfc(math.sqrt(2)), abs=1e-6)
    assert math.isnan(spread.chance(1))


def test_the_sentences_follow_the_numbers():
    def said(*other, first=(1.0, 1.1, 1.2)) -> str:
        base = [fake("ntp", seed, cross_entropy=x) for seed, x in enumerate(first)]
        return " ".join(sentences.about([base, [fake("nitp", seed, **x) for seed, x in enumerate(other)]]))

    apart = said({"cross_entropy": 1.5}, {"cross_entropy": 1.61}, {"cross_entropy": 1.7})
    assert "nitp against ntp over 3 seeds, cross-entropy, nats a byte: +0.5033 ± 0.0067" in apart
    assert "outside the spread of seeds" in apart
    near = said({"cross_entropy": 1.2}, {"cross_entropy": 0.9}, {"cross_entropy": 1.31})
    assert "inside the spread of seeds; were both to stay so, about 132 seeds" in near
    below = {"nitp/loss": 0.1, "nitp/floor": 0.3, "nitp/skill": 0.6}
    assert "is below the constant-predictor floor" in said(below, below, below)
    assert "is below, in 1 of 3 seeds," in said(below, {}, {})
    assert "is not below the constant-predictor floor" in said({}, {}, {})
    gone = {"nitp/skill": math.nan, "nitp/floor": 0.00005, "nitp/loss": 0.00007}
    assert "no skill on held-out text" in said(gone, gone, gone)
    other = {"nitp/skill": math.nan, "nitp/floor": math.nan}
    assert "floor is known for the cosine only" in said(other, other, other)
    assert "x[t+1] and x[t+8] in 75.0 % and 75.0 %" in said({"probes": 0.75}, {"probes": 0.75}, {"probes": 0.75})
    assert "One seed each" in said({}, first=(1.0,))
