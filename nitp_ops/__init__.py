"""nitp_ops: composable language-model objectives with fused forward and backward kernels.

    objective = nitp_ops.objectives.build("ntp + 0.8*nitp", model=info)

Importing never compiles and never fails for want of the compiled library: `python -m nitp_ops doctor` says what works.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

# torch first: the compiled library takes its symbols from torch's.
import torch  # noqa: F401

from . import layers, reference
from ._alignment import AlignmentStats, alignment
from ._check import BackendError
from ._cross_entropy import cross_entropy
from ._explain import ChunkPlan, explain
from ._head_job import HeadJob, TokenEntropyStats, TokenStats
from ._implicit_token_loss import implicit_token_loss
from ._linear_cross_entropy import linear_cross_entropy
from ._shared_linear_cross_entropy import shared_linear_cross_entropy
from ._swiglu import swiglu

if TYPE_CHECKING:
    from . import geometry

try:
    __version__ = metadata.version("nitp_ops")
except metadata.PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "AlignmentStats",
    "BackendError",
    "ChunkPlan",
    "HeadJob",
    "TokenEntropyStats",
    "TokenStats",
    "alignment",
    "cross_entropy",
    "explain",
    "geometry",
    "implicit_token_loss",
    "layers",
    "linear_cross_entropy",
    "reference",
    "shared_linear_cross_entropy",
    "swiglu",
]


def __getattr__(name: str) -> Any:
    # On first use: `import nitp_ops` must not pay for the registry and its plugins, the one arrow that runs up, nor for
    # geometry (13 ms).
    if name in ("geometry", "objectives", "integrations"):
        return importlib.import_module(f".{name}", __name__)
    if name == "attach":
        return importlib.import_module(".integrations", __name__).attach
    raise AttributeError(f"module 'nitp_ops' has no attribute {name!r}")
