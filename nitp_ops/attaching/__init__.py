"""The objectives in the trainers that people already have; see docs/trainers.md.

    tapped = tap(model, objective, blocks="transformer.h", norm="transformer.ln_f", head="lm_head")    # any loop
    handle = attach(model, "ntp + 0.8*nitp")                                       # a Hugging Face model, in place

No trainer package is imported before one of its adapters is.
"""

from .api import attach, handle_of
from .batch_streams import token_streams
from .handle import Handle
from .tapping import Tap, tap

__all__ = ["Handle", "Tap", "attach", "handle_of", "tap", "token_streams"]
