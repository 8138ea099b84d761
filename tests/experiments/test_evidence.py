"""The evidence: three objectives on each text, equal tokens and equal time, measured once, a page
made of records."""

from __future__ import annotations

import json
import statistics
import xml.etree.ElementTree as xml

import pytest

from experiments import equal_budgets as module
from experiments import evidence
from experiments.train import run as run_module
from tests.experiments.pretrain_cases import verdicts, write_text

pytestmark = pytest.mark.programs


OPTIONS = """
    --threads 1 --dim 16 --layers 3 --heads 2 --context 16 --batch 4 --steps 6 --eval-every 3 --eval-windows 8
    --checkpoint-every 6 --seeds 0 1 --rounds 3
"""


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    """Two texts; every step of another arm than the baseline takes twice its time."""
    out, texts = tmp_path_factory.mktemp("evidence"), []
    for name in ("one", "two"):
        folder = tmp_path_factory.mktemp(name)
        write_text(folder)
        (folder / "own.txt").write_text(f"{name}\n" * 40)
        texts.append(str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module,
            "_ratios",
            lambda *_: {name: 1.0 if name == "ntp" else 2.0 for name in module.ARMS},
        )
        arguments = [
            *OPTIONS.split(),
            "--texts",
            *texts,
            "--out",
            str(out),
            "--page",
            str(out / "evidence.md"),
        ]
        assert evidence.main(arguments) == 0
    return out, arguments


def lines(out) -> list[dict]:
    found = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()[1:]]
    return [line for line in found if line["experiment"] == "run"]


def test_an_arm_has_the_tokens_of_the_baseline_and_the_steps_of_its_time(gathered):
    for text in {line["text"] for line in lines(gathered[0])}:
        found = {
            (x["arm"], x["budget"], x["seed"]): x["steps"]
            for x in lines(gathered[0])
            if x["text"] == text
        }
        for seed in (0, 1):
            assert found["ntp", "equal tokens", seed] == found["nitp", "equal tokens", seed] == 6
            assert found["nitp", "equal time", seed] == found["mtp", "equal time", seed] == 3
        assert len(found) == 2 * 5


def test_the_page_says_what_the_records_say_for_every_text(gathered):
    text = (gathered[0] / "evidence.md").read_text()
    assert (
        text.count("\n## ") == 2
        and "No verdict below five seeds: with 2 a 95 % interval" in text
        and not verdicts(text)
        and "## one" in text
        and "* machine: " in text
        and "* time: " in text
        and "seeds 0, 1" in text
    )
    for fingerprint in {line["text"] for line in lines(gathered[0])}:
        for arm, budget in (
            ("ntp", "equal tokens"),
            ("nitp", "equal tokens"),
            ("mtp", "equal time"),
        ):
            own = [
                x["cross_entropy"]
                for x in lines(gathered[0])
                if (x["text"], x["arm"], x["budget"]) == (fingerprint, arm, budget)
            ]
            assert f"{statistics.fmean(own):.4f} ± {statistics.stdev(own):.4f}" in text
    for number in (1, 2):
        for theme in ("light", "dark"):
            name = f"evidence-{number}-{theme}.svg"
            assert name in text and xml.parse(gathered[0] / name).getroot().tag.endswith("svg")
    assert "prefers-color-scheme: dark" in text


def test_nothing_is_trained_twice_and_the_page_can_be_written_again(gathered, monkeypatch):
    out, arguments = gathered
    before = lines(out)
    monkeypatch.setattr(run_module.Run, "step", None)
    assert evidence.main([*arguments, "--write-only"]) == 0
    assert evidence.main(arguments) == 0
    assert lines(out) == before and not list(out.rglob("checkpoint.pt"))


def test_the_ratio_of_step_times_comes_from_interleaved_steps(tmp_path, monkeypatch):
    now, order = [0.0], []

    def step(run):
        order.append(run.name.split(",")[0])
        now[0] += {"ntp": 1.0, "nitp": 1.5, "mtp": 3.0}[order[-1]]

    monkeypatch.setattr(run_module.Run, "step", step)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    plan = module.parse(
        [*OPTIONS.split(), "--texts", str(write_text(tmp_path)), "--out", str(tmp_path / "out")]
    )
    corpus = module.load_corpus(plan.texts[0], 16, 4)
    assert module._ratios(plan.options, corpus, 3) == {"ntp": 1.0, "nitp": 1.5, "mtp": 3.0}
    assert order == [*("ntp", "nitp", "mtp"), *("nitp", "ntp", "mtp"), *("mtp", "ntp", "nitp")]
