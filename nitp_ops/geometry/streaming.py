"""The streaming half of `nitp_ops.geometry`: float64 sums over batches, a bounded sample, one
finish."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from ..core.devices import with_float64
from ..reference import in_square_range
from .sample import UniformSample

_EPS = torch.finfo(torch.float64).eps
# 2**22 float64 numbers are 32 MiB: the largest temporary of an update.
_BLOCK_ELEMENTS = 2**22


def check_tensor(x: torch.Tensor, function: str) -> None:
    """Refuse anything but a floating point tensor of shape ``[..., d]``."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{function}: x is {type(x).__name__}, expected a tensor")
    if not x.is_floating_point():
        raise TypeError(f"{function}: x has dtype {x.dtype}, expected a floating point dtype")
    if x.dim() < 2 or x.shape[-1] == 0:
        raise ValueError(f"{function}: x has shape {tuple(x.shape)}, expected (..., d) with d >= 1")


def check_finite(rows: torch.Tensor, function: str) -> None:
    """Refuse rows with a NaN or an infinity."""
    bad = int((~torch.isfinite(rows).all(dim=-1)).sum())
    if bad:
        raise ValueError(
            f"{function}: x has NaN or infinity in {bad} of {rows.shape[0]} rows, expected finite "
            "values"
        )


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """``x / |x|`` a row, however large or small its numbers are; a zero row stays zero."""
    rows = rows * in_square_range(rows)
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / torch.where(norm > 0, norm, 1.0)


def common_unit(rows: torch.Tensor) -> torch.Tensor:
    """0-d, a power of two: times it no square of the rows overflows, nor do those of the largest
    row vanish.

    What is a ratio of squares is the same in any unit, to the bit.
    """
    return in_square_range(rows.reshape(-1)).squeeze(-1) if rows.numel() else rows.new_ones(())


def spectral_floor(n: int, d: int, frobenius: torch.Tensor) -> torch.Tensor:
    """Singular values below this are rounding of the input: the spectrum of equal rows is zero, not
    noise."""
    return _EPS * max(n, d) * frobenius


def entropy_rank(spectrum: torch.Tensor) -> float:
    """``exp(-sum p ln p)`` with ``p = spectrum / sum``; NaN for a zero spectrum."""
    total = spectrum.sum()
    if not total > 0:
        return math.nan
    return float(torch.special.entr(spectrum / total).sum().exp())


def pairwise_cosine(unit_sum: torch.Tensor, squares: torch.Tensor, n: int) -> float:
    """``(|sum u|^2 - sum |u|^2) / (n (n - 1))``; the second sum is n unless rows are zero."""
    return float((unit_sum.square().sum() - squares) / (n * (n - 1)))


class _Moments(NamedTuple):
    """Sums of one set of rows, of x times `unit`; `scatter` is ``sum (x - mean)(x - mean)^T``."""

    count: int
    unit: torch.Tensor
    total: torch.Tensor
    norms: torch.Tensor
    scatter: torch.Tensor
    unit_total: torch.Tensor
    unit_squares: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, unit: torch.Tensor) -> _Moments:
        scale = common_unit(rows)
        rows = rows * scale
        total = rows.sum(dim=0)
        centred = rows - total / rows.shape[0]
        norms = torch.linalg.vector_norm(rows, dim=-1).sum()
        scatter = centred.T @ centred
        return cls(
            rows.shape[0], scale, total, norms, scatter, unit.sum(dim=0), unit.square().sum()
        )

    def plus(self, other: _Moments) -> _Moments:
        n, m = self.count, other.count
        unit = torch.minimum(self.unit.to(other.unit.device), other.unit)
        mine, other = self.to(unit), other.to(unit)
        gap = other.total / m - mine.total / n
        between = torch.outer(gap, gap) * (n * m / (n + m))
        return _Moments(
            n + m,
            unit,
            mine.total + other.total,
            mine.norms + other.norms,
            mine.scatter + other.scatter + between,
            mine.unit_total + other.unit_total,
            mine.unit_squares + other.unit_squares,
        )

    def to(self, unit: torch.Tensor) -> _Moments:
        """The same on the device of another unit, and in it."""
        moved = _Moments(self.count, *(t.to(unit.device) for t in self[1:]))
        by = unit / moved.unit
        return moved._replace(
            unit=unit,
            total=moved.total * by,
            norms=moved.norms * by,
            scatter=moved.scatter * by * by,
        )


class Accumulator:
    """The numbers of `nitp_ops.geometry` over a stream of batches, each with its definition beside
    it.

    Keeps, in float64 and on the device of the batches: n, ``sum x``, ``sum |x|``, ``sum x / |x|``,
    the scatter ``sum (x - mean)(x - mean)^T``, and a random sample of unit rows for uniformity. The
    scatter is combined by the pairwise update of Chan et al., so a large common offset cancels
    nothing. Any split into batches gives the numbers of the whole, to rounding.

    Args:
        width: d, the size of the last axis.
        source: what was measured ("hidden_states[5], before the final norm"); repeated in every
            record.
        max_rows: rows in the sample for uniformity, at least 2.
        seed: seed of the sample; give each rank its own.

    Raises:
        ValueError: width below 1 or max_rows below 2.

    Example:
        >>> import torch
        >>> left, right = Accumulator(3), Accumulator(3)
        >>> x = torch.cat([torch.eye(3), -torch.eye(3)])
        >>> left.update(x[:2])
        >>> right.update(x[2:])
        >>> record = (left + right).compute()["effective_rank"]
        >>> round(record["value"], 6), record["centring"], record["n"], record["d"]
        (3.0, 'mean', 6, 3)

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances" (1979).
    """

    def __init__(
        self, width: int, *, source: str = "", max_rows: int = 1024, seed: int = 0
    ) -> None:
        if width < 1:
            raise ValueError(f"Accumulator: width is {width}, expected at least 1")
        self.width = width
        self.source = source
        self._moments: _Moments | None = None
        self._sample = UniformSample(max_rows, seed, "Accumulator")

    @property
    def count(self) -> int:
        """Rows seen so far."""
        return self._moments.count if self._moments else 0

    def update(self, x: torch.Tensor) -> None:
        """Add the rows of ``x[..., width]``; no rows is fine.

        Raises:
            TypeError: x is no floating point tensor.
            ValueError: another width, a NaN or infinity (then nothing of x is added).
        """
        check_tensor(x, "Accumulator.update")
        if x.shape[-1] != self.width:
            raise ValueError(
                f"Accumulator.update: x has shape {tuple(x.shape)}, expected (..., {self.width})"
            )
        rows = with_float64(x.detach()).reshape(-1, self.width)
        check_finite(rows, "Accumulator.update")
        block = max(1, _BLOCK_ELEMENTS // self.width)
        for start in range(0, rows.shape[0], block):
            part = rows[start : start + block].to(torch.float64)
            unit = unit_rows(part)
            self._add(_Moments.of(part, unit))
            self._sample.add(unit)

    def _add(self, moments: _Moments) -> None:
        self._moments = self._moments.plus(moments) if self._moments else moments

    def merge(self, other: Accumulator) -> Accumulator:
        """Add another accumulator's rows to this one and return this one (``a + b`` leaves both
        alone).

        Raises:
            TypeError: other is no Accumulator.
            ValueError: another width, source or max_rows.
        """
        if not isinstance(other, Accumulator):
            raise TypeError(
                f"Accumulator.merge: other is {type(other).__name__}, expected an Accumulator"
            )
        mine = (self.width, self.source, self._sample.max_rows)
        theirs = (other.width, other.source, other._sample.max_rows)
        if mine != theirs:
            raise ValueError(
                f"Accumulator.merge: other has (width, source, max_rows) {theirs}, expected {mine}"
            )
        if other._moments:
            self._add(other._moments)
            self._sample.merge(other._sample)
        return self

    def __add__(self, other: Accumulator) -> Accumulator:
        result = Accumulator(self.width, source=self.source, max_rows=self._sample.max_rows)
        result.merge(self)
        result._sample.generator.set_state(self._sample.generator.get_state())
        return result.merge(other)

    def compute(self) -> dict[str, dict[str, Any]]:
        """One record a number: ``{"value", "definition", "centring", "n", "d", "source"}``, ready
        for JSON.

        Keys: effective_rank, effective_rank_singular, top_component_share, mean_pairwise_cosine,
        mean_norm_ratio, uniformity. Singular values come from the second moment, so those below
        1e-8 of the largest are not resolved.

        Raises:
            ValueError: fewer than two rows were seen.
        """
        if self._moments is None or self._moments.count < 2:
            raise ValueError(
                f"Accumulator.compute: {self.count} rows were seen, expected at least 2"
            )
        n, _, total, norms, scatter, unit_total, unit_squares = self._moments
        second_moment = scatter + torch.outer(total, total) / n
        noise = spectral_floor(n, self.width, second_moment.trace().sqrt()).square()

        def eigenvalues(matrix: torch.Tensor) -> torch.Tensor:
            values = torch.linalg.eigvalsh(matrix)
            least = noise.clamp_min(_EPS * self.width * values[-1])
            return torch.where(values > least, values, 0.0)

        variances = eigenvalues(scatter)
        sampled = self._sample.keys.shape[0]
        records = {
            "effective_rank": (
                entropy_rank(variances),
                "exp(-sum p ln p), p = eigenvalues of the covariance / their sum",
                "mean",
            ),
            "effective_rank_singular": (
                entropy_rank(eigenvalues(second_moment).sqrt()),
                "exp(-sum p ln p), p = singular values of x / their sum",
                "none",
            ),
            "top_component_share": (
                float(variances[-1] / variances.sum()),
                "largest eigenvalue of the covariance / sum of its eigenvalues",
                "mean",
            ),
            "mean_pairwise_cosine": (
                pairwise_cosine(unit_total, unit_squares, n),
                "mean of cos(x_i, x_j) over all i != j",
                "none",
            ),
            "mean_norm_ratio": (
                float(torch.linalg.vector_norm(total) / norms),
                "|mean x| / mean |x|",
                "none",
            ),
            "uniformity": (
                self._sample.uniformity(),
                f"log mean exp(-2 |u_i - u_j|^2), u = x / |x|, over all pairs of {sampled} "
                "sampled rows",
                "none",
            ),
        }
        context = {"n": n, "d": self.width, "source": self.source}
        return {
            name: {"value": value, "definition": definition, "centring": centring, **context}
            for name, (value, definition, centring) in records.items()
        }
