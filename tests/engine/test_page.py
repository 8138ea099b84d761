"""What the registry says of itself: the page of objectives, the command's list and its explanation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nitp_ops import __main__ as command
from nitp_ops.engine.reports import pages
from nitp_ops.objectives import ModelInfo, available, build
from tests.support.objectives_cases import INFO

PAGE = Path(__file__).parents[2] / "docs/objectives.md"
SIZES = ["--hidden", "1280", "--vocab", "152064", "--layers", "24"]


def test_the_page_is_what_the_registry_says():
    """By the command that the page names, in a process that has imported no objective yet."""
    command = "nitp_ops.engine.reports.pages"
    written = subprocess.run(
        [sys.executable, "-m", command], capture_output=True, text=True, check=True
    )
    assert PAGE.read_text() == written.stdout, f"run python -m {command} > docs/objectives.md"


def test_every_objective_has_a_section_with_its_options_and_its_source():
    sections = {text.partition("\n")[0]: text for text in pages.page().split("\n## ")[1:]}
    assert set(sections) == set(available())
    assert (
        "| kl_weight | a number | `1.0` |" in sections["nextlat"]
        and "arXiv 2511.05963" in sections["nextlat"]
    )
    assert "hidden_states[5] of 24 blocks" in sections["nitp"]
    assert all(
        "\n```python\n>>> " in text and "``\n" not in text.replace("```\n", "")
        for text in sections.values()
    )


def test_the_command_lists_every_objective_with_its_equation(capsys: pytest.CaptureFixture[str]):
    assert command.main(["list"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(lines) == set(available())
    assert lines["nitp"].startswith("1 - cos(P(h_t), z_{t+1})")


def test_explain_gives_bytes_and_the_plan_of_passes(capsys: pytest.CaptureFixture[str]):
    spec = "ntp + 0.8*nitp + nextlat + more: ntp(z_loss=1e-4)"
    assert command.main(["explain", spec, *SIZES, "--tokens", "4096"]) == 0
    text = capsys.readouterr().out
    assert (
        f"bytes per token: {2 * 1280 * 4:,} read (2 hidden streams of d numbers of 4 bytes)" in text
    )
    assert "passes over 4,096 tokens:" in text
    assert "ntp, more: one pass over the unembedding; linear_cross_entropy: 2 x 4096 rows" in text
    assert "nitp: a pass of its own" in text
    assert "2 head terms of 4 terms, 26,214,400 parameters added" in text


@pytest.mark.parametrize(
    ("spec", "rows"),
    [
        ("ntp + mtp_shared(offsets=[2, 3])", "64 rows"),
        ("ntp + mtp_parallel(offsets=[2, 3])", "3 x 64 rows"),
        ("mtp_sequential(depth=2)", "2 x 64 rows"),
    ],
)
def test_explain_counts_the_sets_of_rows_that_share_a_pass(spec: str, rows: str):
    text = build(spec, model=ModelInfo(hidden_size=8, vocab_size=32, num_layers=4)).explain(
        tokens=64
    )
    assert f"one pass over the unembedding; linear_cross_entropy: {rows} in" in text


def test_a_spec_that_is_wrong_is_explained_on_standard_error(capsys: pytest.CaptureFixture[str]):
    assert command.main(["explain", "ntp + nitpp", *SIZES]) == 2
    assert 'Did you mean "nitp"?' in capsys.readouterr().err


def test_a_term_without_a_projector_adds_no_parameter():
    info = ModelInfo(hidden_size=8, vocab_size=32, num_layers=4)
    text = build("next_embedding", model=info).explain()
    assert "parameters added:" not in text and "training FLOPs per token: 144 (18 d)" in text
    assert "0 parameters added" in text


def test_narrow_models_read_fewer_bytes():
    half = ModelInfo(hidden_size=8, vocab_size=32, num_layers=4, dtype=torch.bfloat16)
    assert (
        "bytes per token: 16 read (1 hidden stream of d numbers of 2 bytes)"
        in build("ntp", model=half).explain()
    )
    assert "bytes per token" not in build("external", model=INFO).explain()
