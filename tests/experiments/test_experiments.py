"""The experiments: measured once, kept, continued; a document whose words follow its numbers."""

from __future__ import annotations

import json
import re
import signal
import statistics

import pytest

from experiments import ablations as experiments
from experiments.analysis import overhead, records
from experiments.console import failure
from experiments.report import hypotheses
from experiments.train import run as run_module
from tests.experiments.pretrain_cases import arms, fake, verdicts

pytestmark = pytest.mark.programs


OPTIONS = """
    --threads 1 --dim 16 --layers 3 --heads 2 --context 16 --batch 4 --steps 4 --eval-every 4 --eval-windows 8
    --checkpoint-every 2 --seeds 0 1
"""
KEPT = ("ntp", "nitp", "no stop-gradient")


@pytest.fixture(autouse=True, scope="module")
def three_arms():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "CONTROLS", tuple(row for row in arms.CONTROLS if row.name in KEPT))
        yield


def experiment(text, out, *more) -> int:
    own = [
        "--experiments",
        "arms",
        "--data",
        str(text),
        "--out",
        str(out),
        "--document",
        str(out / "doc.md"),
    ]
    return experiments.main([*OPTIONS.split(), *own, *more])


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()[1:]]


def measured(out) -> list[tuple]:
    """Everything that two runs of the same arms must agree on: no times, no machine."""
    timed = ("step_low", "step_seconds", "step_high")
    return [
        (
            x["arm"],
            x["seed"],
            {k: v for k, v in x["numbers"].items() if k not in timed},
            x["batches"],
            x["sample"],
        )
        for x in lines(out)
        if x["experiment"] == "arms"
    ]


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    """Both experiments without a stop."""
    out = tmp_path_factory.mktemp("straight")
    own = ["--experiments", "arms", "overhead", "--overhead-dims", "16", "32", "--rounds", "2"]
    assert experiment(text, out, *own) == 0
    return out


def test_the_document_holds_every_arm_its_deviation_the_hypotheses_and_the_overhead(straight):
    document = (straight / "doc.md").read_text()
    found = lines(straight)
    for name in KEPT:
        values = [x["numbers"]["cross_entropy"] for x in found if x.get("arm") == name]
        assert (
            f"| {name} | {statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f} |"
            in document
        )
        assert f"| {name}: linear |" in document and f"| {name}: nearest neighbours |" in document
    for said in (
        "3 arms x 2 seeds x 4 steps x 64 tokens",
        "No benchmark is measured here",
        "No verdict below five seeds: with 2 a 95 % interval",
        "* machine: ",
    ):
        assert said in document, said
    assert re.search(
        r"\| nitp raises the effective rank \| paper \| effective rank, nitp - ntp "
        r"\| [+-].* \|",
        document,
    )
    assert not verdicts(document)
    assert "| d = 16, ours |" in document and "| d = 32, eager |" in document
    assert "Incomplete" not in document and not re.search(r"\bnan\b|\binf\b", document)
    assert (straight / "doc.png").read_bytes().startswith(b"\x89PNG")
    assert (straight / "report.html").exists() and not list(straight.rglob("checkpoint.pt"))


@pytest.mark.parametrize("code", [143, None], ids=["SIGTERM", "crash"])
def test_a_stopped_experiment_goes_on_where_it_stood_and_measures_nothing_twice(
    text, straight, tmp_path, monkeypatch, capsys, code
):
    calls = []
    original = run_module.Run.step

    def step(run):
        calls.append((run.name, run.done))
        if len(calls) == 8 and code is None:
            raise RuntimeError("the machine went away")
        if len(calls) == 7 and code:
            signal.raise_signal(signal.SIGTERM)
        return original(run)

    monkeypatch.setattr(run_module.Run, "step", step)
    if code is None:
        with pytest.raises(RuntimeError, match="went away"):
            experiment(text, tmp_path, "--seeds", "0")
    else:
        assert experiment(text, tmp_path, "--seeds", "0") == code
        assert "continue with: " in capsys.readouterr().err
    assert [(x["arm"], x["seed"]) for x in lines(tmp_path)] == [("ntp", 0)]
    assert experiment(text, tmp_path, "--seeds", "0") == 0
    # The crash lost the step after the checkpoint of step 2, and the step in which it fell.
    assert len(calls) == 3 * 4 + (0 if code else 2)
    assert measured(tmp_path) == measured(straight)[:3]


def test_the_document_can_be_written_again_without_measuring(text, straight, monkeypatch):
    before = (straight / "doc.md").read_text().splitlines()
    monkeypatch.setattr(run_module.Run, "step", None)
    assert experiment(text, straight, "--experiments") == 0
    after = (straight / "doc.md").read_text().splitlines()
    assert [x for x in before if not x.startswith("* command")] == [
        x for x in after if not x.startswith("* command")
    ]


def test_an_arm_that_diverges_is_reported_and_the_others_go_on(text, tmp_path, monkeypatch):
    original = run_module.Run.step

    def step(run):
        if run.name == "nitp":
            raise failure.Diverged("nitp: at step 0 the loss is nan")
        return original(run)

    monkeypatch.setattr(run_module.Run, "step", step)
    assert experiment(text, tmp_path, "--seeds", "0") == 0
    document = (tmp_path / "doc.md").read_text()
    assert "* nitp: at step 0 the loss is nan" in document and "Incomplete" not in document
    assert len(lines(tmp_path)) == 3 and "| no stop-gradient |" in document
    assert not re.search(r"\bnan\b", document.replace("the loss is nan", ""))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--dim", "32"], "--dim 16, this run has --dim 32"),
        (["--eval-windows", "6"], "--eval-windows"),
        (["--data", __file__], "the text"),
        (["--rounds", "1"], "--rounds"),
        (["--experiments", "arm"], "--experiments"),
    ],
)
def test_records_of_other_settings_and_bad_options_are_refused(text, straight, capsys, more, said):
    before = (straight / "records.jsonl").read_bytes()
    assert experiment(text, straight, *more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ablations: ") and said in line
    assert (straight / "records.jsonl").read_bytes() == before


def test_a_line_cut_short_by_a_crash_is_dropped_and_the_rest_kept(tmp_path):
    path = tmp_path / "r.jsonl"
    file = records.Records(path, {"lr": 0.1})
    file.add(arm="a", value=1.5, gone=float("nan"))
    with open(path, "a") as torn:
        torn.write('{"arm": "b", "val')
    again = records.Records(path, {"lr": 0.1})
    again.add(arm="c")
    assert [line["arm"] for line in records.Records(path, {"lr": 0.1}).lines] == ["a", "c"]
    assert (
        again.find(arm="a") == {"arm": "a", "value": 1.5, "gone": None}
        and again.find(arm="b") is None
    )
    path.write_text("not json\n")
    with pytest.raises(failure.BadInput, match="not a file of records"):
        records.Records(path, {"lr": 0.1})


def test_hypotheses_stand_beside_their_differences_and_three_seeds_have_no_verdict():
    ntp = [fake("ntp", seed) for seed in range(3)]
    nitp = [fake("nitp", seed, effective_rank=9 + x) for seed, x in enumerate((0.5, 0.6, 0.55))]
    table = hypotheses.table_of(hypotheses.found([ntp, nitp]))
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["nitp raises the effective rank"] == [
        "paper",
        "effective rank, nitp - ntp",
        "+0.55 ± 0.06",
        "none below 5 seeds",
    ]
    assert table.header[-2:] == ["difference ± two standard errors", "verdict"]
    assert "without a projector hidden states align" not in rows
    five = [
        [fake(name, seed, effective_rank=9 + seed * by) for seed in range(5)]
        for name, by in (("ntp", 0), ("b", 1))
    ]
    table = hypotheses.differences(five, wide=True)
    assert table.title == 'less "ntp", paired by seed, ± 95 % interval'
    assert table.rows[0][2] == f"+2.00 ± {2.776445 * 2.5**0.5 / 5**0.5:.2f}"


def test_the_overhead_is_the_median_ratio_of_rounds_beside_the_formula():
    result = overhead.Overhead(
        512, "native", 5, 256, 1024, plain=[1.0, 2.0, 4.0], added=[1.1, 2.6, 4.8]
    )
    assert result.measured == pytest.approx(0.2)
    assert result.predicted == 1 / (5 + 256 / (12 * 512))
    (row,) = overhead.overhead_table([result]).rows
    assert row == [
        "d = 512, ours",
        "2,000.0",
        "2,600.0",
        "+20.0%",
        "+15.0% to +25.0%",
        "+19.8%",
        "1.01",
    ]
