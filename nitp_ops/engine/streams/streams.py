"""What one forward pass offers to the objectives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from nitp_ops.engine.spec.validation import is_int, of_64_bits

from .checks import check_dtypes, check_label_layout, checked_shape, external_pair
from .context_parallel import SequenceShard, columns
from .document_ids import derive_documents
from .needs import Need

_HIDDEN_FIELDS = ("last_hidden", "last_residual")
#: Fields of hidden states, as a `Need` names them.
HIDDEN_STREAMS = (*_HIDDEN_FIELDS, "hidden_states")
#: Whose document a pre-shifted label belongs to, see `Streams`.
LabelLayout: TypeAlias = Literal["document", "stream"]
#: What `Streams` sets for itself. No fields: FSDP2 makes its inputs anew from theirs, all of which
#: must be arguments.
_DERIVED = ("spans", "shape", "device", "external_pairs", "documents", "formed")


@dataclass(kw_only=True)
class Streams:
    """Token streams ``[B, T]`` and hidden streams ``[B, T, d]`` of one batch; all optional, nothing
    is copied.

    Args:
        token_ids: ids; also the targets where no labels are given.
        labels: targets, unshifted: ``labels[t]`` belongs to token t (Hugging Face).
        shift_labels: targets, pre-shifted: ``shift_labels[t]`` belongs to token t + 1 (Megatron,
            torchtitan, nanoGPT). labels or shift_labels, never both.
        label_layout: how shift_labels were made; labels and token_ids have no other layout than
            their own. "document": inside each document, so that a label belongs to the document of
            the position where it stands and a document's last label, its end of text, is a target
            (torchtitan, NeMo). "stream": over the whole row; the label at a document's last
            position is the next document's first token, no target.
        document_ids: >= 0 the document, < 0 padding. Or derive them from attention_mask (0 is
            padding), position_ids (``[B, T]`` or ``[1, T]``; a break wherever the position is not
            the previous + 1) or cu_seqlens (1-D).
        target_mask: bool; token t may be a target. It belongs to the target, not to the token that
            predicts it.
        token_weight: weight of token t as a target, in every head term; float.
        class_weight: ``[V]`` float, weight of each token id as a target, for
            ``ntp(class_weight=true)``.
        last_hidden: final hidden state after the final norm. last_residual: the same before it.
        hidden_states: ``{k: residual stream after k blocks}``, 0 the embedding output.
        head, embed: the module (anything with ``weight [V, d]`` and perhaps ``bias [V]``) or a leaf
            tensor ``[V, d]``.
        external: ``{name: (sum, count)}`` that the model computed itself, or ``{name: sum}`` with a
            count of 1.
        ignore_index: the label that means "no target".
        shard: under context parallel, the part of the sequence that is here. Token streams and
            documents are then of the whole sequence, ``[B, shard.length]``, hidden streams of the
            part, ``[B, shard.size, d]``.

    Attributes:
        shape: (B, T) of the hidden streams. spans: which positions of the token streams they are.
        documents: document ids ``[B, T]`` after all derivations, or None: one document a row.
        external_pairs: `external` with every count there, a 0-d int64 tensor.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, both kinds of labels, document sources that
            disagree.

    Example:
        >>> ids, mask = torch.tensor([[5, 6, 7, 0]]), torch.tensor([[1, 1, 1, 0]])
        >>> streams = Streams(token_ids=ids, attention_mask=mask)
        >>> streams.documents.tolist()
        [[0, 0, 0, -1]]
    """

    token_ids: Tensor | None = None
    labels: Tensor | None = None
    shift_labels: Tensor | None = None
    document_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    cu_seqlens: Tensor | None = None
    target_mask: Tensor | None = None
    token_weight: Tensor | None = None
    class_weight: Tensor | None = None
    last_hidden: Tensor | None = None
    last_residual: Tensor | None = None
    hidden_states: Mapping[int, Tensor] = field(default_factory=dict)
    head: nn.Module | Tensor | None = None
    embed: nn.Module | Tensor | None = None
    external: Mapping[str, Tensor | tuple[Tensor, Tensor | int]] = field(default_factory=dict)
    ignore_index: int = -100
    label_layout: LabelLayout = "document"
    shard: SequenceShard | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and self.shift_labels is not None:
            raise ValueError(
                "Streams: labels and shift_labels are both given, expected at most one of them"
            )
        check_label_layout("Streams", self.label_layout)
        if not is_int(self.ignore_index):
            raise TypeError(
                f"Streams: ignore_index is {self.ignore_index!r}, expected an "
                f"integer{of_64_bits(self.ignore_index)}"
            )
        if not isinstance(self.hidden_states, Mapping):
            got = type(self.hidden_states).__name__
            raise TypeError(
                f"Streams: hidden_states is a {got}, expected a mapping of block count to tensor"
            )
        if not (self.shard is None or isinstance(self.shard, SequenceShard)):
            raise TypeError(
                f"Streams: shard is a {type(self.shard).__name__}, expected a SequenceShard"
            )
        whole = checked_shape(self)
        self.spans = ((0, whole[1]),) if self.shard is None else self.shard.spans
        self.shape = whole if self.shard is None else (whole[0], self.shard.size)
        self.device = self.tokens.device
        self.formed: dict[Any, Any] | None = None
        check_dtypes(self)
        self.external_pairs = {name: external_pair(self, name) for name in self.external}
        self.documents = derive_documents(
            whole,
            self.device,
            document_ids=self.document_ids,
            attention_mask=self.attention_mask,
            position_ids=self.position_ids,
            cu_seqlens=self.cu_seqlens,
        )

    @property
    def tokens(self) -> Tensor:
        """The stream that says which token comes next: shift_labels, labels or token_ids."""
        return getattr(self, self.tokens_name)

    @property
    def tokens_name(self) -> str:
        """The field that `tokens` is."""
        for name in ("shift_labels", "labels", "token_ids"):
            if getattr(self, name) is not None:
                return name
        raise ValueError(
            "Streams: token_ids, labels and shift_labels are all missing, expected one of them"
        )

    def offers(self, need: Need) -> bool:
        """Whether a stream is here."""
        if need.stream == "hidden_states":
            return need.layer in self.hidden_states
        if need.stream == "external":
            return need.name in self.external
        # labels stand in for token_ids
        return need.stream == "token_ids" or getattr(self, need.stream, None) is not None

    def here(self, values: Tensor) -> Tensor:
        """Of a token stream ``[B, T, ...]`` the positions that the hidden streams have."""
        return columns(values, self.spans)

    def hidden_streams(self) -> dict[str, Tensor]:
        """Every hidden stream that is here, under the name of its `Need`."""
        found = {name: getattr(self, name) for name in _HIDDEN_FIELDS}
        for k, value in self.hidden_states.items():
            found[f"hidden_states[{k}]"] = value
        return {name: value for name, value in found.items() if value is not None}

    def for_a_call(self) -> Streams:
        """The same for one call of an objective: what `targets` derives of the tokens is derived once
        there."""
        other = self.with_hidden({})
        other.formed = {}
        return other

    def with_hidden(self, streams: Mapping[str, Tensor]) -> Streams:
        """The same with some hidden streams replaced by others of their shapes: nothing is checked
        or derived again.

        Args:
            streams: by the names of `hidden_streams`.
        """
        other = object.__new__(type(self))
        # torch 2.11 traces neither copy nor vars: names of fields, also of a subclass
        if torch.compiler.is_compiling():
            for name in (*(each.name for each in fields(self)), *_DERIVED):
                setattr(other, name, getattr(self, name))
        else:
            vars(other).update(vars(self))
        for name in _HIDDEN_FIELDS:
            setattr(other, name, streams.get(name, getattr(self, name)))
        names = {k: f"hidden_states[{k}]" for k in self.hidden_states}
        states = {k: streams[name] for k, name in names.items() if name in streams}
        if states:
            other.hidden_states = {**self.hidden_states, **states}
        return other

    def widened(self, names: Iterable[str]) -> Streams:
        """Narrow streams of these names in float32: several gradients add up there and are rounded
        once. The ops still run their GEMMs in the weights' dtype, from the same values."""
        wide = {}
        for name in names:
            hidden = getattr(self, name)
            if hidden is None or not hidden.requires_grad:
                continue
            if hidden.dtype in (torch.bfloat16, torch.float16):
                wide[name] = hidden.float()
        return self.with_hidden(wide) if wide else self
