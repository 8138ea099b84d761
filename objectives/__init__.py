"""Training objectives as declarations: ``loss = sum over parts of weight * SUM / COUNT``.

    objective = build("ntp + 0.8*nitp(target_layer=0.2)", model=ModelInfo(...))
    out = objective(Streams(token_ids=ids, last_hidden=h, hidden_states={4: s4}, head=model.lm_head))
    out.loss.backward()

An objective is a frozen dataclass that is registered under a name; `build` turns a spec of them into one
`torch.nn.Module`. Head terms (cross-entropies against the unembedding) share one pass over its matrix.
"""

if __name__ != "nitp_ops.objectives":
    raise ImportError(f"objectives: imported as {__name__!r}, expected 'nitp_ops.objectives'")

import importlib
from typing import TYPE_CHECKING, Any

from .base import Context, HeadReading, HeadRows, HeadTerm, LatentPart, LatentTerm, Objective
from .blocks import KeyValues
from .composite import CompositeObjective, Output, build
from .counts import Counts
from .drafting import Drafting, Trunk
from .metrics import Metrics
from .model_info import ModelInfo
from .needs import Need
from .registry import available, offer, register
from .schedule import Piecewise, Ramp, schedule
from .schema import SpecError
from .sequence_shard import SequenceShard
from .spec import Spec, parse
from .streams import Streams
from .window import Window

if TYPE_CHECKING:
    from .external import External
    from .fsp_bow import FSPBagOfWords
    from .mtp_parallel import MTPParallel
    from .mtp_sequential import MTPSequential
    from .mtp_shared import MTPShared
    from .next_embedding import NextEmbedding
    from .nextlat import NextLat
    from .nitp import NITP
    from .ntp import NTP
    from .regularizers import CosineRegularizer
    from .top import TOP

#: Where the objectives of this package live, each imported when it is first named, like those of other packages.
_BUILT_IN = {
    "cosine_regularizer": "regularizers:CosineRegularizer",
    "external": "external:External",
    "fsp_bow": "fsp_bow:FSPBagOfWords",
    "mtp_parallel": "mtp_parallel:MTPParallel",
    "mtp_sequential": "mtp_sequential:MTPSequential",
    "mtp_shared": "mtp_shared:MTPShared",
    "next_embedding": "next_embedding:NextEmbedding",
    "nextlat": "nextlat:NextLat",
    "nitp": "nitp:NITP",
    "ntp": "ntp:NTP",
    "top": "top:TOP",
}
offer(__name__, _BUILT_IN)

__all__ = [
    "NITP",
    "NTP",
    "TOP",
    "CompositeObjective",
    "Context",
    "CosineRegularizer",
    "Counts",
    "Drafting",
    "External",
    "FSPBagOfWords",
    "HeadReading",
    "HeadRows",
    "HeadTerm",
    "KeyValues",
    "LatentPart",
    "LatentTerm",
    "MTPParallel",
    "MTPSequential",
    "MTPShared",
    "Metrics",
    "ModelInfo",
    "Need",
    "NextEmbedding",
    "NextLat",
    "Objective",
    "Output",
    "Piecewise",
    "Ramp",
    "SequenceShard",
    "Spec",
    "SpecError",
    "Streams",
    "Trunk",
    "Window",
    "available",
    "build",
    "parse",
    "register",
    "schedule",
]


def __getattr__(name: str) -> Any:
    module = {cls: module for module, _, cls in (home.partition(":") for home in _BUILT_IN.values())}.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(f".{module}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
