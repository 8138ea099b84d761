"""Training objectives as declarations: ``loss = sum over parts of weight * SUM / COUNT``.

    objective = build("ntp + 0.8*nitp(target_layer=0.2)", model=ModelInfo(...)) out =
    objective(Streams(token_ids=ids, last_hidden=h, hidden_states={4: s4}, head=model.lm_head))
    out.loss.backward()

An objective is a frozen dataclass that is registered under a name; `build` turns a spec of them
into one `torch.nn.Module`. Head terms (cross-entropies against the unembedding) share one pass over
its matrix.
"""

if __name__ != "nitp_ops.objectives":
    raise ImportError(f"objectives: imported as {__name__!r}, expected 'nitp_ops.objectives'")

import importlib
from typing import TYPE_CHECKING, Any

from nitp_ops.engine.base import (
    Context,
    HeadReading,
    HeadRows,
    HeadTerm,
    LatentPart,
    LatentTerm,
    Objective,
)
from nitp_ops.engine.composite import CompositeObjective, Output, build
from nitp_ops.engine.counts import Counts
from nitp_ops.engine.drafting.decoding import Drafting, Trunk
from nitp_ops.engine.metrics import Metrics
from nitp_ops.engine.modules.blocks import KeyValues
from nitp_ops.engine.parsing import Spec, parse
from nitp_ops.engine.registry import available, offer, register
from nitp_ops.engine.spec.schedule import Piecewise, Ramp, schedule
from nitp_ops.engine.spec.validation import SpecError
from nitp_ops.engine.streams.context_parallel import SequenceShard
from nitp_ops.engine.streams.model_info import ModelInfo
from nitp_ops.engine.streams.needs import Need
from nitp_ops.engine.streams.streams import Streams
from nitp_ops.engine.window import Window

if TYPE_CHECKING:
    from .external import External
    from .latent.fsp_bow import FSPBagOfWords
    from .latent.next_embedding import NextEmbedding
    from .latent.nextlat import NextLat
    from .latent.nitp import NITP
    from .regularizers.cosine_regularizer import CosineRegularizer
    from .tokens.mtp_parallel import MTPParallel
    from .tokens.mtp_sequential import MTPSequential
    from .tokens.mtp_shared import MTPShared
    from .tokens.ntp import NTP
    from .tokens.top import TOP

#: Where the objectives of this package live, each imported when it is first named, like those of
#: other packages.
_BUILT_IN = {
    "cosine_regularizer": "regularizers.cosine_regularizer:CosineRegularizer",
    "external": "external:External",
    "fsp_bow": "latent.fsp_bow:FSPBagOfWords",
    "mtp_parallel": "tokens.mtp_parallel:MTPParallel",
    "mtp_sequential": "tokens.mtp_sequential:MTPSequential",
    "mtp_shared": "tokens.mtp_shared:MTPShared",
    "next_embedding": "latent.next_embedding:NextEmbedding",
    "nextlat": "latent.nextlat:NextLat",
    "nitp": "latent.nitp:NITP",
    "ntp": "tokens.ntp:NTP",
    "top": "tokens.top:TOP",
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
    module = {
        cls: module for module, _, cls in (home.partition(":") for home in _BUILT_IN.values())
    }.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(f".{module}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
