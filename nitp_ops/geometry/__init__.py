"""Geometry of hidden states: effective rank, mean cosine, top component, mean norm ratio,
uniformity, probes.

Each function of ``x[..., d]`` (all leading axes are rows) works in float64 and returns a Python
float. `linear_probe` and `knn_probe` take sequences and ask what a frozen state says about a later
token. `Accumulator` gives the same numbers from a stream of batches and writes each number's
definition beside it, because published values differ mostly by definition (centred or not,
covariance or singular values, n, d).
"""

from .metrics import (
    effective_rank,
    mean_norm_ratio,
    mean_pairwise_cosine,
    top_component_share,
    uniformity,
)
from .probe_rows import Probe
from .probes import knn_probe, linear_probe
from .streaming import Accumulator

__all__ = [
    "Accumulator",
    "Probe",
    "effective_rank",
    "knn_probe",
    "linear_probe",
    "mean_norm_ratio",
    "mean_pairwise_cosine",
    "top_component_share",
    "uniformity",
]
