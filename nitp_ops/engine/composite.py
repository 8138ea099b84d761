"""The module that `build` makes of a spec: counts, loss and metrics of all its terms."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nitp_ops.core.devices import for_sums

from .base import Context, HeadReading, HeadTerm, LatentPart, LatentTerm, Objective, check_shard
from .counts import Counts
from .drafting.decoding import Drafting, Trunk, choose, decode
from .error_names import sums_of
from .explain import explain
from .metrics import Metrics
from .modules.kept_values import KeepsValues
from .modules.module_call import Sealed, inside_call, is_fully_sharded
from .parsing import Spec, SpecLike, parse
from .plan.head_passes import run_heads
from .plan.head_terms import HeadTermPart, head_term_parts
from .plan.stream_use import StreamUse
from .plan.weighting import (
    Part,
    always_active,
    check_step,
    contribution,
    counted_parts,
    divided,
    part_name,
    weight_of,
    zero_weight_mask,
)
from .streams.model_info import ModelInfo
from .streams.streams import Streams
from .window import Window, window_of


class Output(NamedTuple):
    """loss: 0-d, differentiable. metrics: detached sums, see `Metrics`."""

    loss: Tensor
    metrics: Metrics


def build(
    spec: SpecLike, *, model: ModelInfo, seed: int = 0, backend: str | None = None
) -> CompositeObjective:
    """The objective that a spec declares, for a model: ``loss = sum over parts of weight * SUM /
    COUNT``.

    Args:
        spec: in any spelling, see `parse`.
        model: sizes and head transforms of the model.
        seed: of the own parameters; each term draws from its own generator, so terms do not disturb
            each other.
        backend: of the ops: None (the device decides), "native" or "reference".

    Raises:
        SpecError: everything that is wrong with the spec, or with it for this model.
        TypeError: model is no ModelInfo.

    Example:
        >>> from nitp_ops.objectives import ModelInfo, Streams
        >>> info = ModelInfo(hidden_size=8, vocab_size=16, num_layers=4)
        >>> objective = build("ntp + 0.8*nitp(target_layer=0.2)", model=info)
        >>> sorted(map(str, objective.requires))
        ['head', 'hidden_states[1]', 'last_hidden', 'token_ids']
        >>> h, s1 = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8)
        >>> ids, head = torch.ones(2, 5, dtype=torch.int64), nn.Linear(8, 16, bias=False)
        >>> streams = Streams(token_ids=ids, last_hidden=h, hidden_states={1: s1}, head=head)
        >>> out = objective(streams)
        >>> out.loss.backward()
        >>> out.metrics.compute()["ntp/count"]
        8
    """
    if not isinstance(model, ModelInfo):
        raise TypeError(f"build: model is a {type(model).__name__}, expected a ModelInfo")
    return CompositeObjective(parse(spec, model), model, seed, backend)


class CompositeObjective(Sealed, KeepsValues):
    """What `build` returns. It owns the terms' parameters and nothing else; heads come with the
    streams.

    Attributes:
        spec: the frozen spec. info: the model's sizes. requires: the streams that a call must
            bring, as `Need`s.
    """

    def __init__(self, spec: Spec, info: ModelInfo, seed: int, backend: str | None) -> None:
        super().__init__()
        self.spec, self.info, self.backend = spec, info, backend
        self._use = StreamUse(spec.terms, info)
        self.requires = self._use.requires
        self.terms = nn.ModuleDict()
        for term in spec.terms:
            module = term.make_module(info, zlib.crc32(f"{seed}:{term.label}".encode()))
            if module is not None:
                self.terms[str(term.label)] = module

    def __call__(self, streams: Streams, **options: Any) -> Output:
        """`forward`; under `fully_shard` the policy casts nothing of what comes in or goes out."""
        if not is_fully_sharded(self):
            return nn.Module.__call__(self, streams, **options)
        if not isinstance(streams, Streams):
            return super().__call__(streams, **options)
        forward, hidden = self.forward, streams.hidden_streams()

        def use(*tensors: Tensor) -> Output:
            return forward(streams.with_hidden(dict(zip(hidden, tensors, strict=True))), **options)

        return inside_call(self, list(hidden.values()), use)

    def _owners(self) -> Iterator[nn.Module]:
        return iter(self.terms.values())

    def count(self, streams: Streams) -> Counts:
        """Rows that count in each part. Needs no hidden stream: it can run over a whole window
        before the forward."""
        return Counts(
            {name: part.count for name, part in self._parts(streams.for_a_call()).items()}
        )

    def forward(
        self,
        streams: Streams,
        *,
        window: Window | None = None,
        counts: Counts | None = None,
        step: int | Tensor | None = None,
        gradient_reduction: Literal["mean", "sum"] | None = None,
    ) -> Output:
        """``loss = sum over parts of weight * SUM / max(COUNT, 1)``, SUM over this batch, COUNT
        over the window.

        Args:
            streams: of this batch, with everything in `requires`.
            window: counts, step and reduction of the window that the batch belongs to, see
                `Window`.
            counts, step, gradient_reduction: the same one by one, for a plain loop; not with
                window.

        Raises:
            TypeError, ValueError: missing or unfit streams, counts of other parts, no step for a
                schedule.
        """
        window = window_of(window, counts, step, gradient_reduction)
        hidden = self._use.check(streams)
        check_step(self.spec.terms, window.step)
        working = torch.float64 if torch.float64 in [x.dtype for x in hidden] else torch.float32
        streams = streams.for_a_call()
        parts = self._parts(streams)
        local = {name: part.count for name, part in parts.items()}
        whole = local if window.counts is None else window.counts
        if whole.keys() != local.keys():
            raise ValueError(
                f"objective: counts has parts {sorted(whole)}, expected {sorted(local)}"
            )
        weights, coefficients = {}, {}
        for name, part in parts.items():
            weight = weight_of(part, window.step, streams.device)
            denominator = whole[part.denominator].to(streams.device)
            weights[name] = weight
            coefficients[name] = divided(weight * window.loss_factor, denominator, working)
        losses, sums = self._run(streams, parts, coefficients, window)
        for name, part in parts.items():
            sums[name]["weighted"] = contribution(weights[name], sums[name]["loss"])
            sums[name] |= {"denominator": local[part.denominator], "count": part.count}
        return Output(sum(losses[1:], start=losses[0]), Metrics(sums))

    def param_groups(self) -> list[dict[str, Any]]:
        """Own parameters for an optimizer: ``{"params", "matrices": True}`` the 2-D ones (for
        Muon), then the others.

        Groups without parameters are left out.
        """
        groups = []
        for matrices in (True, False):
            own = [p for p in self.parameters() if (p.dim() == 2) == matrices]
            groups.append({"params": own, "matrices": matrices})
        return [group for group in groups if group["params"]]

    def draft(
        self,
        trunk: Trunk,
        prompt: Tensor,
        new_tokens: int,
        *,
        label: str | None = None,
        max_drafts: int | None = None,
        stop_token: int | None = None,
    ) -> Drafting:
        """Greedy decoding, sped up: a multi-token head guesses tokens ahead, one call of the model
        checks them.

        Every token is the model's own greedy choice: the text is that of plain greedy decoding, up
        to near ties that rounding decides (several tokens at once go through other kernels than
        one). Nothing is differentiated.

        Args:
            trunk: the model with its cache, which has read nothing yet: ``extend(token_ids [1,
                n])`` reads n tokens and returns their `Streams` (last_hidden, head, what the term
                reads), ``cut(length)`` forgets the end.
            prompt: int64 [1, T], T >= 1. new_tokens: how many to add, >= 1.
            label: of the term that drafts (an mtp_shared, mtp_parallel or mtp_sequential); not
                needed for the only one.
            max_drafts: of a call; None: as many as the term makes, 0: plain greedy. stop_token:
                decoding ends with it.

        Raises:
            TypeError, ValueError: unfit arguments or streams; no such term, or one that can not
                draft.

        Example:
            >>> from nitp_ops.objectives import ModelInfo, Streams
            >>> embed, head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
            >>> class Bigram:  # its hidden state is the embedding of the last token
            ...     def extend(self, ids):
            ...         return Streams(token_ids=ids, last_hidden=embed(ids), head=head, embed=embed)
            ...     def cut(self, length): pass
            >>> info = ModelInfo(hidden_size=8, vocab_size=16, num_layers=1)
            >>> objective = build("ntp + mtp_sequential", model=info)
            >>> found = objective.draft(Bigram(), torch.tensor([[1, 2, 3]]), 10)
            >>> found.token_ids.shape[1], found.calls <= 10
            (13, True)

        Source: arXiv 2211.17192 at temperature zero, with the heads of arXiv 2404.19737 and
            2412.19437.
        """
        modules = dict(self.terms.items())
        drafters = {}
        for term in self.spec.terms:
            name = str(term.label)
            drafters[name] = term.drafter(modules.get(name), self.info)
        drafter = choose(drafters, label)
        return decode(trunk, drafter, self.info, prompt, new_tokens, max_drafts, stop_token)

    def explain(self, tokens: int = 8192) -> str:
        """What the spec means for this model: weights, resolved layers, parameters added, FLOPs and
        bytes per token, and how the passes over ``tokens`` rows are cut into chunks."""
        return explain(self.spec.terms, self.info, self.terms, tokens)

    def _parts(self, streams: Streams) -> dict[str, Part]:
        check_shard(self.spec.terms, streams, self.info, self.terms)
        return counted_parts(self.spec.terms, str(self.spec.main_label), streams)

    def _run(
        self,
        streams: Streams,
        parts: dict[str, Part],
        coefficients: dict[str, Tensor],
        window: Window,
    ) -> tuple[list[Tensor], dict[str, dict[str, Tensor]]]:
        """(losses to be added, ``{part: sums}`` in declaration order)."""
        streams = self._use.widened(streams)
        head_parts: list[HeadTermPart] = []
        latent: dict[str, LatentPart | HeadReading] = {}
        for term in self.spec.terms:
            own = {}
            for name, part in parts.items():
                if part.term is term:
                    own[part.key] = coefficients[name]
            context = self._context(term, own)
            given = self._use.for_term(streams, term, context.mask_zero_weight)
            if isinstance(term, HeadTerm):
                rows = term.rows(given, context)
                head_parts += head_term_parts(term, rows, own, streams.ignore_index)
            elif isinstance(term, LatentTerm):
                for key, computed in sums_of(term, given, context).items():
                    latent[part_name(term, key)] = computed
        losses, sums, latent_parts = run_heads(head_parts, latent, self.info, self.backend)
        for name, part in latent_parts.items():
            # counts of a window may be infinite: where it has no label at all
            finite = window.counts is None and always_active(parts[name].term)
            loss = part.loss if finite else torch.where(coefficients[name] == 0, 0, part.loss)
            losses.append(loss)
            sums[name] = {"loss": for_sums(part.total), **part.means}
            if part.unit_target is not None:
                sums[name]["unit_target"] = part.unit_target
        return losses, {name: sums[name] for name in parts}

    def _context(self, term: Objective, coefficients: dict[str, Tensor]) -> Context:
        label = str(term.label)
        module = self.terms[label] if label in self.terms else None  # noqa: SIM401 (a ModuleDict has no get)
        mask = zero_weight_mask(term, list(coefficients.values()))
        normalizer = {}
        if isinstance(term, LatentTerm):
            normalizer = {key: value.reciprocal() for key, value in coefficients.items()}
        return Context(self.info, module, self.backend, normalizer, mask)
