"""The numbers of `geometry` are ratios: the unit that hidden states are measured in changes none of
them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nitp_ops import geometry

# 2^700 is 5e210: its square is no float64, and that of 2^-700 is zero
UNITS = [2.0**1000, 2.0**700, 2.0**-700, 2.0**-1000]
FUNCTIONS = {
    "effective_rank": geometry.effective_rank,
    "effective_rank_singular": lambda x: geometry.effective_rank(x, "singular"),
    "top_component_share": geometry.top_component_share,
    "mean_pairwise_cosine": geometry.mean_pairwise_cosine,
    "mean_norm_ratio": geometry.mean_norm_ratio,
    "uniformity": geometry.uniformity,
}


def rows() -> Tensor:
    return torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.3


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_gives_the_same_in_every_unit(name: str, unit: float):
    assert FUNCTIONS[name](rows() * unit) == FUNCTIONS[name](rows())


@pytest.mark.parametrize("unit", UNITS)
def test_an_accumulator_gives_the_same_in_every_unit(unit: float):
    plain, other = geometry.Accumulator(5), geometry.Accumulator(5)
    for part in rows().split(15):
        plain.update(part)
        other.update(part * unit)
    for name, record in other.compute().items():
        assert record["value"] == pytest.approx(plain.compute()[name]["value"], rel=1e-12)
        assert record["value"] == pytest.approx(FUNCTIONS[name](rows()), rel=1e-9)


def test_batches_of_unlike_sizes_give_the_numbers_of_the_whole():
    """The rows of a small batch count no more beside those of a large one, but for their
    directions."""
    x = torch.cat([rows() * 2.0**-700, rows().flip(0) * 2.0**700])
    streamed = geometry.Accumulator(5)
    for part in x.split(16):
        streamed.update(part)
    halves = [geometry.Accumulator(5), geometry.Accumulator(5)]
    for half, part in zip(halves, x.split(40), strict=True):
        half.update(part)
    for found in (streamed, halves[1] + halves[0]):
        for name, record in found.compute().items():
            assert record["value"] == pytest.approx(FUNCTIONS[name](x), rel=1e-9), name


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("probe", [geometry.linear_probe, geometry.knn_probe])
def test_a_probe_gives_the_same_in_every_unit(probe, unit: float):
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, (12, 8), generator=draw)
    hidden = torch.nn.functional.one_hot(ids.roll(-1, 1), 5).double()
    hidden += 0.3 * torch.randn(hidden.shape, generator=draw, dtype=torch.float64)
    assert probe(hidden * unit, ids) == probe(hidden, ids)
    assert probe(hidden, ids).accuracy > 0.5
