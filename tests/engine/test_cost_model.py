"""The calculator of bytes on a mesh, and the description of a part of a sequence, without any
second process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nitp_ops
from nitp_ops import __main__ as command
from nitp_ops.engine.reports import scaling
from nitp_ops.engine.reports.cost_model import Mesh, estimate_cost
from nitp_ops.engine.streams import context_parallel
from nitp_ops.objectives import ModelInfo, SequenceShard, Streams, available, build
from tests.support.objectives_cases import INFO, make_batch

PAGE = Path(__file__).parents[2] / "docs/scaling.md"
WIDE = ModelInfo(hidden_size=64, vocab_size=512, num_layers=24, dtype=torch.bfloat16)


def by_purpose(spec: str, mesh: Mesh, **options: int) -> dict[str, int]:
    cost = estimate_cost(spec, WIDE, mesh, **{"tokens": 4096, **options})
    return {f"{each.collective} {each.purpose}": each.sent for each in cost.traffic}


def test_the_page_is_what_the_calculator_says():
    command = "nitp_ops.engine.reports.scaling"
    written = subprocess.run(
        [sys.executable, "-m", command], capture_output=True, text=True, check=True
    )
    assert PAGE.read_text() == written.stdout, f"run python -m {command} > docs/scaling.md"


def test_the_page_has_the_papers_widths():
    """arXiv 2605.24956, table 4 and appendix C."""
    widths = {setting.name: setting.width for setting in scaling._settings()}
    assert widths["MoE 9B-A1B"] == 1280 and widths["MoE 45B-A5.5B"] == 3072


def test_what_a_rank_sends_is_the_formula_written_out():
    found = by_purpose("ntp + 0.8*nitp", Mesh(tp=4, dp=8, cp=2))
    head, projector, rows = 512 // 4 * 64 * 2, 12 * 64**2 * 2, 4096
    assert found == {
        "all-reduce counts": 2 * (8 * (2 + 1) * 15 // 16),
        "all-gather parameters of nitp": 2 * projector * 15 // 16,
        "reduce-scatter gradients of nitp": projector * 15 // 16,
        "all-gather parameters of head": 2 * head * 15 // 16,
        "reduce-scatter gradients of head": head * 15 // 16,
        # one row of 64 bfloat16 numbers at the start of each of 2 x 2 chunks, of which half is the
        # rank's own
        "all-gather rows past the chunks": 4 * 64 * 2 // 2,
        # maximum, prediction, sum, target: float32
        "all-gather softmax across the vocabulary": rows * 4 * 4 * 3,
        "all-reduce hidden gradients across it": 2 * (rows * 64 * 4 * 3 // 4),
        "all-reduce metrics": 2 * (8 * (5 + 6 + 64) * 15 // 16),
    }


def test_a_single_rank_sends_nothing_and_holds_the_chunk():
    cost = estimate_cost("ntp + nitp", WIDE, Mesh(), tokens=4096)
    assert cost.traffic == () and cost.sent == 0
    plan = nitp_ops.explain(
        "linear_cross_entropy", rows=4096, width=64, vocabulary=512, dtype=torch.bfloat16
    )
    assert (
        cost.memory["the largest pass: its parameters whole, its chunk"]
        >= 512 * 64 * 2 + plan.peak_bytes
    )
    assert cost.memory["tapped states"] == 4096 * 64 * 2 and cost.peak == sum(cost.memory.values())


def test_targets_that_share_rows_share_their_sums():
    one, three = (
        by_purpose(spec, Mesh(tp=2)) for spec in ("ntp", "ntp + mtp_shared(offsets=[2, 3])")
    )
    kind = "all-gather softmax across the vocabulary"
    assert three[kind] - one[kind] == 2 * 4096 * 4
    assert (
        three["all-reduce hidden gradients across it"]
        == one["all-reduce hidden gradients across it"]
    )


@pytest.mark.parametrize("name", available())
def test_every_objective_has_a_cost_or_a_reason(name: str):
    assert estimate_cost(f"main: ntp + extra: {name}", INFO, Mesh(dp=4), tokens=64).sent > 0
    try:
        assert estimate_cost(f"main: ntp + extra: {name}", INFO, Mesh(cp=4), tokens=64).sent > 0
    except ValueError as error:
        assert "extra: its blocks" in str(error) or "extra: it pairs" in str(error)


def test_a_latent_term_that_reads_the_head_is_refused_beside_tensor_parallel_ranks():
    with pytest.raises(ValueError, match="tp is 2, expected 1 with nextlat"):
        estimate_cost("ntp + nextlat", WIDE, Mesh(tp=2), tokens=64)


@pytest.mark.parametrize("text", ["tp", "tp=0", "tp=2,tp=2", "pp=2", "tp=two", ""])
def test_a_mesh_that_is_none_is_refused_by_name(text: str):
    with pytest.raises(ValueError, match="mesh: "):
        Mesh.parse(text)


def test_the_command_prints_what_a_rank_sends(capsys: pytest.CaptureFixture[str]):
    sizes = ["--hidden", "64", "--vocab", "512", "--layers", "24", "--tokens", "4096"]
    assert command.main(["explain", "ntp + nitp", *sizes, "--mesh", "tp=2,dp=4,cp=2"]) == 0
    text = capsys.readouterr().out
    assert (
        "on each rank of a mesh tp=2,dp=4,cp=2:" in text
        and "rows past the chunks: all-gather" in text
    )
    assert "bytes sent a step of one microbatch" in text
    assert command.main(["explain", "ntp", *sizes, "--mesh", "tp=2,dp"]) == 2
    assert 'mesh: an axis is "dp"' in capsys.readouterr().err


def test_one_rank_that_holds_all_chunks_computes_what_it_does_without_a_shard():
    batch = make_batch(length=8)
    for layout in ("contiguous", "zigzag"):
        shard = SequenceShard(length=8, layout=layout)  # type: ignore[arg-type]
        for spec in (
            "ntp + nitp(shift=2) + nextlat + top + mtp_shared",
            "nitp(shift=0, stop_gradient=false)",
        ):
            objective = build(spec, model=INFO)
            mine, plain = (objective(batch.streams(shard=given)).loss for given in (shard, None))
            torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("contiguous", [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]),
        ("zigzag", [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]),
    ],
)
def test_which_positions_each_rank_holds(layout, expected, monkeypatch: pytest.MonkeyPatch):
    for rank, positions in enumerate(expected):
        monkeypatch.setattr(context_parallel, "group_size", lambda group, rank=rank: (4, rank))
        assert SequenceShard(length=16, layout=layout).take(
            torch.arange(16).view(1, 16)
        ).tolist() == [positions]


def test_a_part_that_does_not_fit_is_refused_by_name():
    with pytest.raises(ValueError, match="length is 7, expected a multiple of 2"):
        SequenceShard(length=7, layout="zigzag")
    with pytest.raises(ValueError, match="layout is 'striped'"):
        SequenceShard(length=8, layout="striped")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"length is 8\.0"):
        SequenceShard(length=8.0)  # type: ignore[arg-type]
    ids, shard = torch.ones(2, 6, dtype=torch.int64), SequenceShard(length=8)
    with pytest.raises(ValueError, match="expected all 8 tokens"):
        Streams(token_ids=ids, shard=shard)
    with pytest.raises(ValueError, match="axis 1 has 6 positions, expected 8"):
        shard.take(ids)
    with pytest.raises(TypeError, match="shard is a int, expected a SequenceShard"):
        Streams(token_ids=ids, shard=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spec",
    [
        "cosine_regularizer",
        "mtp_sequential",
        "nitp(stop_gradient=false)",
        "mtp_parallel(offsets=[2])",
    ],
)
def test_a_term_that_needs_the_whole_sequence_is_refused_before_anything_runs(spec: str):
    streams = make_batch(length=8).streams(shard=SequenceShard(length=8))
    with pytest.raises(ValueError, match="streams has a shard of the sequence: "):
        build(spec, model=INFO).count(streams)
