"""Which streams the terms of a spec read, and in which form: checked, widened, masked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from nitp_ops.engine.base import HeadTerm, LatentTerm, Objective
from nitp_ops.engine.streams.model_info import ModelInfo
from nitp_ops.engine.streams.needs import Need, checked, named
from nitp_ops.engine.streams.streams import HIDDEN_STREAMS, Streams
from nitp_ops.engine.streams.targets import check_targets

from .weighting import always_active


class StreamUse:
    """
    Attributes:
        requires: the streams that a call must bring.
    """

    def __init__(self, terms: Sequence[Objective], info: ModelInfo) -> None:
        self._info = info
        needs = [checked(str(term.label), term.requires(info)) for term in terms]
        self.requires = checked("build", (need for own in needs for need in own))
        # torch.compile traces tuples of names, but no set of dataclasses
        self._needs = tuple(sorted(self.requires, key=str))
        self._names = tuple(named(self.requires))
        self._predicts_tokens = any(term.predicts_tokens for term in terms)
        self._masked: dict[str, list[str]] = {}
        for term, own in zip(terms, needs, strict=True):
            if _reads_states(term):
                self._masked[str(term.label)] = _with_gradient(own)
        readers = [name for own in needs for name in named(own)]
        self._widened = [
            name for name in ("last_hidden", "last_residual") if readers.count(name) > 1
        ]

    def check(self, streams: Streams) -> list[Tensor]:
        """Refuses what the terms can not use; returns the floating point streams that they read."""
        if not isinstance(streams, Streams):
            raise TypeError(f"objective: streams is a {type(streams).__name__}, expected Streams")
        missing = [str(need) for need in self._needs if not streams.offers(need)]
        if missing:
            raise ValueError(
                f"objective: streams lacks {', '.join(missing)}, expected {', '.join(self._names)}"
            )
        read = []
        for name, hidden in streams.hidden_streams().items():
            if name not in self._names:
                continue
            read.append(hidden)
            if hidden.shape[-1] != self._info.hidden_size:
                expected = (*streams.shape, self._info.hidden_size)
                raise ValueError(
                    f"objective: {name} has shape {tuple(hidden.shape)}, expected {expected}"
                )
        if self._predicts_tokens:
            check_targets(streams, self._info.vocab_size)
        for name, (total, _) in streams.external_pairs.items():
            if f"external[{name}]" in self._names:
                read.append(total)
        return read

    def widened(self, streams: Streams) -> Streams:
        """Streams that several terms read, in float32, see `Streams.widened`."""
        return streams.widened(self._widened) if self._widened else streams

    def for_term(
        self, streams: Streams, term: Objective, mask: Callable[[Tensor], Tensor]
    ) -> Streams:
        """The streams as the term gets them: those that it sends gradients into stay clean while
        its weight is zero."""
        names = self._masked.get(str(term.label))
        if always_active(term) or not names:
            return streams
        hidden = streams.hidden_streams()
        return streams.with_hidden({name: mask(hidden[name]) for name in names})


def _reads_states(term: Objective) -> bool:
    """Whether it computes on hidden states itself; the op masks the rows of its own terms."""
    if isinstance(term, HeadTerm):
        return term.own_states() > 0
    return isinstance(term, LatentTerm)


def _with_gradient(needs: frozenset[Need]) -> list[str]:
    hidden = [need for need in needs if need.stream in HIDDEN_STREAMS]
    return sorted(str(need) for need in hidden if need.grad)
