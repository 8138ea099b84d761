"""An op's error in the name of what the user called: a term, or the objective whose terms share a
pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nitp_ops import BackendError

from .base import Context, LatentTerm
from .streams.streams import Streams

#: What an op raises for an argument that it does not take.
OP_ERRORS = (TypeError, ValueError, IndexError, NotImplementedError, BackendError)
_OPS = ("alignment", "grouped_linear_cross_entropy", "implicit_token_loss", "swiglu")


def rename(error: Exception, caller: str, terms: Sequence[str] = ()) -> None:
    """`op: reason` becomes `caller: reason`, and terms[i] the name of that term; any other error
    stays as it is."""
    op, _, reason = str(error).partition(": ")
    if op in _OPS:
        for index, name in enumerate(terms):
            reason = reason.replace(f"terms[{index}].", f"{name}.")
        error.args = (f"{caller}: {reason}",)


def sums_of(term: LatentTerm, streams: Streams, context: Context) -> Mapping[str, Any]:
    """The term's sums; an error of an op inside names the term."""
    try:
        return term.sums(streams, context)
    except OP_ERRORS as error:
        rename(error, str(term.label))
        raise
