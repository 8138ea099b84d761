"""`nitp_ops.geometry`: identities against all pairs and the SVD, invariances, known spectra,
streams."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nitp_ops import geometry
from nitp_ops.geometry import Accumulator

FUNCTIONS = {
    "effective_rank": geometry.effective_rank,
    "effective_rank_singular": lambda x: geometry.effective_rank(x, "singular"),
    "top_component_share": geometry.top_component_share,
    "mean_pairwise_cosine": geometry.mean_pairwise_cosine,
    "mean_norm_ratio": geometry.mean_norm_ratio,
    "uniformity": geometry.uniformity,
}


def gaussian(n: int, d: int, offset: float = 0.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scale + offset


sizes, widths, offsets = st.integers(2, 40), st.integers(1, 12), st.sampled_from([0.0, 1.0, 100.0])
matrices = st.builds(gaussian, sizes, widths, offsets, st.integers(0, 2**16))


def orthogonal(d: int, seed: int = 1) -> torch.Tensor:
    return torch.linalg.qr(gaussian(d, d, seed=seed)).Q


def accumulated(x: torch.Tensor, *cuts: int) -> dict[str, float]:
    accumulator = Accumulator(x.shape[-1])
    for part in torch.tensor_split(x, cuts):
        accumulator.update(part)
    return {name: record["value"] for name, record in accumulator.compute().items()}


def same(left: float, right: float, tolerance: float = 1e-9) -> bool:
    return math.isclose(left, right, rel_tol=tolerance, abs_tol=tolerance) or (
        left != left and right != right
    )


@settings(deadline=None, max_examples=40)
@given(matrices)
def test_mean_pairwise_cosine_equals_the_mean_over_all_pairs(x):
    cosines = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    n = x.shape[0]
    brute = float((cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1)))
    assert same(geometry.mean_pairwise_cosine(x), brute)


@settings(deadline=None, max_examples=40)
@given(matrices)
def test_uniformity_equals_the_mean_over_all_pairs(x):
    u = torch.nn.functional.normalize(x, dim=-1)
    squares = (u[:, None] - u[None]).square().sum(-1)
    i, j = torch.triu_indices(len(x), len(x), offset=1)
    assert same(geometry.uniformity(x), float((-2 * squares[i, j]).exp().mean().log()))


def test_effective_rank_of_singular_values_equals_the_entropy_of_the_svd():
    x = gaussian(50, 7, offset=1.0)
    p = torch.linalg.svdvals(x)
    p = p / p.sum()
    assert same(geometry.effective_rank(x, "singular"), float((-(p * p.log()).sum()).exp()))


def test_effective_rank_of_the_covariance_equals_the_entropy_of_its_eigenvalues():
    x = gaussian(50, 7, offset=1.0)
    p = torch.linalg.eigvalsh(torch.cov(x.T))
    p = p / p.sum()
    assert same(geometry.effective_rank(x, "covariance"), float((-(p * p.log()).sum()).exp()))
    assert same(geometry.top_component_share(x), float(p.max()))


def test_the_definitions_differ_because_an_offset_changes_only_the_singular_rank():
    x = gaussian(400, 16)
    assert same(geometry.effective_rank(x), geometry.effective_rank(x + 5.0))
    singular = geometry.effective_rank(x, "singular")
    assert not same(singular, geometry.effective_rank(x + 5.0, "singular"), 1e-2)


@pytest.mark.parametrize("rank", [1, 2, 5, 8])
def test_an_isotropic_cloud_of_rank_r_has_effective_rank_r(rank):
    axes = orthogonal(8)[:rank]
    x = torch.cat([axes, -axes])
    assert same(geometry.effective_rank(x), rank)
    assert same(geometry.effective_rank(x, "singular"), rank)
    assert same(geometry.top_component_share(x), 1 / rank)
    assert same(accumulated(x)["effective_rank"], rank)
    assert same(accumulated(x)["effective_rank_singular"], rank, 1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_number_is_invariant_to_rotation_and_scale(name):
    x = gaussian(60, 9, offset=0.5)
    value = FUNCTIONS[name](x)
    assert same(FUNCTIONS[name](x @ orthogonal(9)), value)
    assert same(FUNCTIONS[name](x * 37.0), value)
    assert same(FUNCTIONS[name](x * 2.0**-60), value)


@pytest.mark.parametrize("name", ["mean_pairwise_cosine", "uniformity"])
def test_directions_alone_decide_the_cosine_and_the_uniformity(name):
    x = gaussian(30, 5, offset=0.2)
    lengths = torch.linspace(0.1, 9.0, 30, dtype=torch.float64)[:, None]
    assert same(FUNCTIONS[name](x * lengths), FUNCTIONS[name](x))


def test_the_mean_norm_ratio_weighs_rows_by_their_length():
    assert same(geometry.mean_norm_ratio(torch.tensor([[3.0, 0.0], [-1.0, 0.0]])), 0.5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_leading_axes_are_rows(name):
    x = gaussian(24, 5, offset=0.5)
    assert FUNCTIONS[name](x.reshape(2, 3, 4, 5)) == FUNCTIONS[name](x)


def test_bfloat16_rows_are_measured_in_float64():
    x = gaussian(300, 6, offset=2.0).to(torch.bfloat16)
    assert geometry.effective_rank(x) == geometry.effective_rank(x.to(torch.float64))


def test_equal_rows_have_no_spectrum_and_are_not_measured_from_rounding_noise():
    x = gaussian(1, 5).expand(37, 5)
    assert math.isnan(geometry.effective_rank(x))
    assert math.isnan(geometry.top_component_share(x))
    stream = accumulated(x, 10)
    assert math.isnan(stream["effective_rank"] + stream["top_component_share"])
    assert same(stream["mean_pairwise_cosine"], 1.0)
    assert same(stream["uniformity"], 0.0)


def test_a_zero_row_has_cosine_zero_with_every_other_row():
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    assert same(geometry.mean_pairwise_cosine(x), 1 / 3)
    assert same(accumulated(x, 1)["mean_pairwise_cosine"], 1 / 3)


def test_measuring_builds_no_graph():
    def saved(tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError("autograd saved a tensor")

    x = gaussian(10, 3).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(saved, saved):
        Accumulator(3).update(x)
        for function in FUNCTIONS.values():
            function(x)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(1, 4), ValueError, r"x has shape \(1, 4\), expected at least 2 rows"),
        (torch.ones(4), ValueError, r"x has shape \(4,\), expected \(\.\.\., d\) with d >= 1"),
        (torch.ones(4, 0), ValueError, r"x has shape \(4, 0\), expected \(\.\.\., d\) with d >= 1"),
        (torch.tensor([[1.0], [math.nan]]), ValueError, "x has NaN or infinity in 1 of 2 rows"),
        (
            torch.tensor([[math.inf], [-math.inf]]),
            ValueError,
            "x has NaN or infinity in 2 of 2 rows",
        ),
        (
            torch.ones(4, 4, dtype=torch.int64),
            TypeError,
            "x has dtype torch.int64, expected a floating",
        ),
        ([[1.0], [2.0]], TypeError, "x is list, expected a tensor"),
    ],
)
def test_bad_input_is_one_clear_error(name, x, error, message):
    with pytest.raises(error, match=message) as caught:
        FUNCTIONS[name](x)
    assert "\n" not in str(caught.value)


def test_unknown_options_are_named():
    x = gaussian(4, 2)
    with pytest.raises(
        ValueError, match="definition is 'entropy', expected 'covariance' or 'singular'"
    ):
        geometry.effective_rank(x, "entropy")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="uniformity: max_rows is 1, expected at least 2"):
        geometry.uniformity(x, max_rows=1)
    with pytest.raises(ValueError, match="Accumulator: width is 0, expected at least 1"):
        Accumulator(0)


def test_a_refused_update_adds_nothing():
    accumulator = Accumulator(3)
    accumulator.update(gaussian(5, 3))
    before = accumulator.compute()
    with pytest.raises(ValueError, match=r"x has shape \(5, 4\), expected \(\.\.\., 3\)"):
        accumulator.update(gaussian(5, 4))
    with pytest.raises(ValueError, match="x has NaN or infinity in 1 of 3 rows"):
        accumulator.update(torch.tensor([[1.0, 2.0, 3.0], [4.0, math.nan, 6.0], [7.0, 8.0, 9.0]]))
    assert accumulator.compute() == before


def test_accumulators_of_different_streams_do_not_merge():
    accumulator = Accumulator(3, source="layer 1")
    with pytest.raises(
        ValueError,
        match=r"other has \(width, source, max_rows\) \(4, 'layer 1', "
        r"1024\)",
    ):
        accumulator.merge(Accumulator(4, source="layer 1"))
    with pytest.raises(TypeError, match="other is int, expected an Accumulator"):
        accumulator.merge(3)  # pyright: ignore[reportArgumentType]


def test_one_row_is_too_few_to_compute():
    accumulator = Accumulator(3)
    for rows in (1, 0):
        accumulator.update(gaussian(rows, 3))
    with pytest.raises(ValueError, match="1 rows were seen, expected at least 2"):
        accumulator.compute()
