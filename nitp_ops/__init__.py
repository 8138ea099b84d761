"""nitp_ops: composable language-model objectives with fused forward and backward kernels.

    objective = nitp_ops.objectives.build("ntp + 0.8*nitp", model=info)

Importing never compiles and never fails for want of the compiled library: `python -m nitp_ops
doctor` says what works.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

# torch first: the compiled library takes its symbols from torch's.
import torch  # noqa: F401

from .core import library
from .core.checks import BackendError

if TYPE_CHECKING:
    from . import geometry, layers, reference
    from .layers import LinearCrossEntropy
    from .ops.alignment import AlignmentStats, alignment
    from .ops.chunk_plan import ChunkPlan, explain
    from .ops.cross_entropy.api import linear_cross_entropy
    from .ops.cross_entropy.grouped import grouped_linear_cross_entropy
    from .ops.cross_entropy.logits.api import cross_entropy
    from .ops.cross_entropy.stats import TokenEntropyStats, TokenStats
    from .ops.cross_entropy.term import CrossEntropyTerm
    from .ops.implicit_token.api import implicit_token_loss
    from .ops.swiglu import swiglu

try:
    __version__ = metadata.version("nitp_ops")
except metadata.PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "AlignmentStats",
    "BackendError",
    "ChunkPlan",
    "CrossEntropyTerm",
    "LinearCrossEntropy",
    "TokenEntropyStats",
    "TokenStats",
    "alignment",
    "cross_entropy",
    "explain",
    "geometry",
    "grouped_linear_cross_entropy",
    "implicit_token_loss",
    "layers",
    "linear_cross_entropy",
    "reference",
    "swiglu",
]

#: The module that holds a public name. It is imported on first use: defining the custom ops takes
#: longer than all else.
_HOME = {
    "AlignmentStats": "ops.alignment",
    "ChunkPlan": "ops.chunk_plan",
    "CrossEntropyTerm": "ops.cross_entropy.term",
    "LinearCrossEntropy": "layers",
    "TokenEntropyStats": "ops.cross_entropy.stats",
    "TokenStats": "ops.cross_entropy.stats",
    "alignment": "ops.alignment",
    "attach": "attaching",
    "cross_entropy": "ops.cross_entropy.logits.api",
    "explain": "ops.chunk_plan",
    "grouped_linear_cross_entropy": "ops.cross_entropy.grouped",
    "implicit_token_loss": "ops.implicit_token.api",
    "linear_cross_entropy": "ops.cross_entropy.api",
    "swiglu": "ops.swiglu",
}
_MODULES = frozenset(
    {
        "attaching",
        "distributed",
        "geometry",
        "kernels",
        "layers",
        "objectives",
        "reference",
        "trainers",
    }
)


def __getattr__(name: str) -> Any:
    if name not in _HOME and name not in _MODULES:
        raise AttributeError(f"module 'nitp_ops' has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_HOME.get(name, name)}", __name__)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.objectives":
            raise
        # the installer maps objectives/ into the package
        reason = library.source_tree() or "nitp_ops.objectives is absent, install the package"
        raise AttributeError(f"module 'nitp_ops' has no attribute {name!r}: {reason}") from error
    if name in _HOME:
        globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
