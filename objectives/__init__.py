"""Training objectives as declarations: ``loss = sum over parts of weight * SUM / COUNT``.

    objective = build("ntp + 0.8*nitp(target_layer=0.2)", model=ModelInfo(...))
    out = objective(Streams(token_ids=ids, last_hidden=h, hidden_states={4: s4}, head=model.lm_head))
    out.loss.backward()

An objective is a frozen dataclass that is registered under a name; `build` turns a spec of them into one
`torch.nn.Module`. Head terms (cross-entropies against the unembedding) share one pass over its matrix.
"""

if __name__ != "nitp_ops.objectives":
    raise ImportError(f"objectives: imported as {__name__!r}, expected 'nitp_ops.objectives'")

from .base import Context, HeadReading, HeadRows, HeadTerm, LatentPart, LatentTerm, Objective
from .blocks import KeyValues
from .composite import CompositeObjective, Output, build
from .counts import Counts
from .drafting import Drafting, Trunk
from .external import External
from .fsp_bow import FSPBagOfWords
from .metrics import Metrics
from .model_info import ModelInfo
from .mtp_parallel import MTPParallel
from .mtp_sequential import MTPSequential
from .mtp_shared import MTPShared
from .needs import Need
from .next_embedding import NextEmbedding
from .nextlat import NextLat
from .nitp import NITP
from .ntp import NTP
from .registry import available, register
from .regularizers import CosineRegularizer
from .schedule import Piecewise, Ramp, schedule
from .schema import SpecError
from .sequence_shard import SequenceShard
from .spec import Spec, parse
from .streams import Streams
from .top import TOP
from .window import Window

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
