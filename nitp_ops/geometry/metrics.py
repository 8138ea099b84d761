"""Effective rank, mean cosine, top component, mean norm ratio and uniformity of rows of hidden
states."""

from __future__ import annotations

from typing import Literal

import torch

from ..core.devices import with_float64
from .sample import UniformSample
from .streaming import (
    check_finite,
    check_tensor,
    common_unit,
    entropy_rank,
    pairwise_cosine,
    spectral_floor,
    unit_rows,
)

RankDefinition = Literal["covariance", "singular"]


def _rows(x: torch.Tensor, function: str) -> torch.Tensor:
    check_tensor(x, function)
    rows = with_float64(x.detach()).reshape(-1, x.shape[-1]).to(torch.float64)
    if rows.shape[0] < 2:
        raise ValueError(f"{function}: x has shape {tuple(x.shape)}, expected at least 2 rows")
    check_finite(rows, function)
    return rows


def _singular_values(rows: torch.Tensor, centre: bool) -> torch.Tensor:
    """Of the rows in a unit of their own: their ratios count."""
    n, d = rows.shape
    rows = rows * common_unit(rows)
    values = torch.linalg.svdvals(rows - rows.mean(dim=0) if centre else rows)
    return torch.where(values > spectral_floor(n, d, torch.linalg.matrix_norm(rows)), values, 0.0)


def effective_rank(x: torch.Tensor, definition: RankDefinition = "covariance") -> float:
    """``exp(-sum_i p_i ln p_i)``: the exponential of the entropy of a normalised spectrum, in [1,
    min(n, d)].

    ``"covariance"``: p = eigenvalues of the mean-centred covariance / their sum (NITP).
        ``"singular"``: p =
    singular values of x itself, not centred, / their sum (Roy and Vetterli). The two differ widely
    on one matrix; name the one you report, and use many more rows than d.

    Args:
        x: ``[..., d]``, floating point, at least two rows.

    Returns:
        A float without unit; NaN when the spectrum is zero (equal rows; for ``"singular"`` zero
        rows).

    Raises:
        TypeError: x is no floating point tensor.
        ValueError: fewer than two rows, a NaN or infinity, an unknown definition.

    Example:
        >>> import torch
        >>> round(effective_rank(torch.cat([torch.eye(4), -torch.eye(4)])), 6)
        4.0

    Source: Roy and Vetterli, "The effective rank" (EUSIPCO 2007); NITP, arXiv 2605.24956.
    """
    if definition not in ("covariance", "singular"):
        raise ValueError(
            f"effective_rank: definition is {definition!r}, expected 'covariance' or 'singular'"
        )
    rows = _rows(x, "effective_rank")
    if definition == "singular":
        return entropy_rank(_singular_values(rows, centre=False))
    return entropy_rank(_singular_values(rows, centre=True).square())


def top_component_share(x: torch.Tensor) -> float:
    """``lambda_1 / sum_i lambda_i`` with lambda the eigenvalues of the mean-centred covariance, in
    [1/d, 1].

    Args:
        x: ``[..., d]``, floating point, at least two rows.

    Returns:
        A float without unit; NaN when all rows are equal.

    Raises:
        TypeError: x is no floating point tensor.
        ValueError: fewer than two rows, a NaN or infinity.

    Example:
        >>> import torch
        >>> x = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> round(top_component_share(x), 6)
        0.8

    Source: principal component analysis; reported beside effective rank in NITP, arXiv 2605.24956.
    """
    values = _singular_values(_rows(x, "top_component_share"), centre=True).square()
    return float(values.max() / values.sum())


def mean_pairwise_cosine(x: torch.Tensor) -> float:
    """``sum_{i != j} cos(x_i, x_j) / (n (n - 1))``, computed as ``(|sum_i u_i|^2 - n) / (n (n -
    1))``.

    u_i = x_i / |x_i|; the cost is O(n d). A zero row has cosine 0 with every other row.

    Args:
        x: ``[..., d]``, floating point, at least two rows.

    Returns:
        A float in [-1/(n-1), 1].

    Raises:
        TypeError: x is no floating point tensor.
        ValueError: fewer than two rows, a NaN or infinity.

    Example:
        >>> import torch
        >>> round(mean_pairwise_cosine(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])), 6)
        0.333333

    Source: Ethayarajh, arXiv 1909.00512 (anisotropy as mean cosine); the identity is expanding |sum
        u|^2.
    """
    unit = unit_rows(_rows(x, "mean_pairwise_cosine"))
    return pairwise_cosine(unit.sum(dim=0), unit.square().sum(), unit.shape[0])


def mean_norm_ratio(x: torch.Tensor) -> float:
    """``|mean_i x_i| / mean_i |x_i|``: the share of the length that is a common offset, in [0, 1].

    Args:
        x: ``[..., d]``, floating point, at least two rows.

    Returns:
        A float without unit; NaN when all rows are zero.

    Raises:
        TypeError: x is no floating point tensor.
        ValueError: fewer than two rows, a NaN or infinity.

    Example:
        >>> import torch
        >>> round(mean_norm_ratio(torch.tensor([[3.0, 0.0], [0.0, 3.0]])), 6)
        0.707107

    Source: the mean resultant length of directional statistics (Mardia and Jupp 2000), here with
        lengths
    kept.
    """
    rows = _rows(x, "mean_norm_ratio")
    rows = rows * common_unit(rows)
    mean_norm = torch.linalg.vector_norm(rows, dim=-1).mean()
    return float(torch.linalg.vector_norm(rows.mean(dim=0)) / mean_norm)


def uniformity(x: torch.Tensor, *, max_rows: int = 1024, seed: int = 0) -> float:
    """``log mean_{i < j} exp(-2 |u_i - u_j|^2)`` on unit vectors u_i = x_i / |x_i|, in [-8, 0].

    Lower is more uniform. All pairs when x has at most `max_rows` rows, else all pairs of a random
    sample of `max_rows` rows, drawn with a generator of its own (`seed`): the global random state
    is left alone.

    Args:
        x: ``[..., d]``, floating point, at least two rows.
        max_rows: rows in the sample, at least 2. The cost is O(max_rows^2 d).
        seed: seed of the sample.

    Returns:
        A float, natural logarithm.

    Raises:
        TypeError: x is no floating point tensor.
        ValueError: fewer than two rows, a NaN or infinity, max_rows below 2.

    Example:
        >>> import torch
        >>> round(uniformity(torch.tensor([[1.0, 0.0], [-5.0, 0.0]])), 6)
        -8.0

    Source: Wang and Isola, arXiv 2005.10242 (t = 2).
    """
    sample = UniformSample(max_rows, seed, "uniformity")
    sample.add(unit_rows(_rows(x, "uniformity")))
    return sample.uniformity()
