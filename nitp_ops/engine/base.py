"""What an objective is: a frozen dataclass that declares rows for a head, or computes sums of its
own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from nitp_ops.core.devices import for_sums

from .spec.schedule import Weight, as_weight
from .spec.validation import SpecError, coerce, field_types, type_problem
from .streams.model_info import ModelInfo
from .streams.needs import Need
from .streams.streams import Streams

if TYPE_CHECKING:
    from .drafting.decoding import Drafter


@dataclass(frozen=True)
class Context:
    """What `build` and the step give to a term, beside the streams.

    Attributes:
        info: the model. module: the term's own module, or None. backend: for the ops.
        normalizer: ``{part: COUNT / weight}``, 0-d; a latent term divides its SUM by it.
        mask_zero_weight: passes tensors through; their gradients become exact zeros while the
            weight is zero, so that a NaN inside a term of weight zero reaches nothing. The hidden
            streams of a latent term, and of a head term with states of its own, have passed it; the
            term sends its own parameters and embedded tokens through it.
    """

    info: ModelInfo
    module: nn.Module | None
    backend: str | None
    normalizer: Mapping[str, Tensor]
    mask_zero_weight: Callable[[Tensor], Tensor]

    def part(self, total: Tensor, means: Mapping[str, Tensor] | None = None) -> LatentPart:
        """The only part of a latent term, from its SUM (0-d, differentiable)."""
        return LatentPart(total / self.normalizer[""], for_sums(total.detach()), means or {})


@dataclass(frozen=True)
class HeadRows:
    """Rows of a head term: hidden states ``[B, T, d]`` against labels ``[B, T]`` (ignore_index: no
    target).

    head is a module with weight ``[V, d]`` (and perhaps bias ``[V]``) or a leaf tensor;
    token_weight is ``[B, T]``. With target_weight ``[B, T, K]`` the labels are ``[B, T, K]`` too: K
    weighted targets a row. Accuracy is that of the first that is present. class_weight is ``[V]``,
    not with target_weight.
    """

    hidden: Tensor
    labels: Tensor
    head: nn.Module | Tensor
    token_weight: Tensor | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    target_weight: Tensor | None = None
    class_weight: Tensor | None = None


@dataclass(frozen=True)
class LatentPart:
    """What one part of a latent term computed.

    Attributes:
        loss: ``SUM / normalizer``, 0-d, differentiable. total: SUM, 0-d, detached.
        means: further sums over the counted rows, to be logged divided by the count.
        unit_target: sum of the unit targets ``[D]`` (cosine distance only).
    """

    loss: Tensor
    total: Tensor
    means: Mapping[str, Tensor] = field(default_factory=dict)
    unit_target: Tensor | None = None


@dataclass(frozen=True)
class HeadReading:
    """A part of a latent term that reads a head of the model: ``finish(use(hidden, weight,
    bias))``.

    It waits for the pass that all readers of that head share: an engine that gathers the weight
    does so once a step.

    Attributes:
        head: as in `HeadRows`, its weight unsharded.
        hidden: what gets a gradient through ``use``, see `through_head`.
    """

    head: nn.Module | Tensor
    hidden: Sequence[Tensor]
    use: Callable[[Sequence[Tensor], Tensor, Tensor | None], Tensor]
    finish: Callable[[Tensor], LatentPart]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """``weight * SUM / COUNT``, one for each part; the fields of a subclass are its options.

    Subclass `HeadTerm` or `LatentTerm`, not this class. Types are checked from the annotations;
    ranges in `problems`.

    Args:
        label: name in logs and parameters; the registered name where not given.
        weight: a number >= 0 or a schedule (see `schedule`).
        denominator: "own" divides by this term's count, "main" by NTP's (DeepSeek's convention).

    Raises:
        SpecError: an option of the wrong type or outside its range.
    """

    name: ClassVar[str] = ""
    #: Tokens are its targets, among V: one outside is refused before anything runs.
    predicts_tokens: ClassVar[bool] = False

    label: str | None = None
    weight: Weight = 1.0
    denominator: Literal["own", "main"] = "own"

    def __post_init__(self) -> None:
        found: list[str] = []
        defaults = {each.name: each.default for each in fields(self)}
        for name, expected in field_types(type(self)).items():
            value = getattr(self, name)
            if name == "weight":
                try:
                    object.__setattr__(self, name, as_weight(value))
                except (TypeError, ValueError) as error:
                    found.append(str(error))
            elif problem := type_problem(name, value, expected):
                found.append(problem)
                object.__setattr__(self, name, defaults[name])
            else:
                object.__setattr__(self, name, coerce(value, expected))
        # ranges are checked on values of the right type: the default stands in for any other
        if not any(getattr(self, name) is MISSING for name in defaults):
            found += self.problems()
        if found:
            raise SpecError(
                f"{self.label or self.name or type(self).__name__}: {problem}" for problem in found
            )

    def problems(self) -> list[str]:
        """What is wrong with the options, one line each."""
        return []

    def model_problems(self, info: ModelInfo) -> list[str]:
        """What is wrong with the options for this model, one line each."""
        return []

    def max_offset(self) -> int:
        """The largest k of a target x_{t+k} that a row must have; 0 where the term takes what there
        is."""
        return 0

    def conflicts(self, others: Sequence[Objective]) -> list[str]:
        """What is wrong with the term beside the other terms of its spec, one line each."""
        return []

    def requires(self, info: ModelInfo) -> frozenset[Need]:
        """The streams that the term reads, and which of them get a gradient from it."""
        raise NotImplementedError

    def make_module(self, info: ModelInfo, seed: int) -> nn.Module | None:
        """The module with the term's own parameters, or None; it needs a ``reset_parameters()``."""
        return None

    def part_weight(self, part: str) -> float:
        """Factor on `weight` for one part, > 0."""
        return 1.0

    def valid(self, streams: Streams) -> dict[str, Tensor]:
        """``{part: [B, T]}``, the rows that count (bool) or how often each counts (int64: pairs,
        say).

        A term with one part calls it "". Reads no hidden stream."""
        raise NotImplementedError

    def shard_problems(self, info: ModelInfo, module: nn.Module | None) -> list[str]:
        """What keeps the term from running where `Streams.shard` says that other ranks hold the
        rest of the sequence, one line each; none where `rows` or `sums` reach other positions by
        `shift` alone."""
        return [
            "it does not say that it can run on a part of the sequence, expected its own "
            "shard_problems"
        ]

    def drafter(self, module: nn.Module | None, info: ModelInfo) -> Drafter | None:
        """What guesses tokens ahead with the term's module for one sequence, or None where the term
        can not."""
        return None

    def explain(self, info: ModelInfo) -> dict[str, Any]:
        """Resolved facts for `CompositeObjective.explain`, in reading order."""
        return {}


def check_shard(
    terms: Sequence[Objective], streams: Streams, info: ModelInfo, modules: nn.ModuleDict
) -> None:
    """
    Raises:
        ValueError: the sequence is sharded, and terms can not run on a part of it; each with its
            reason.
    """
    if streams.shard is None:
        return
    own = dict(modules.items())
    found = []
    for term in terms:
        problems = term.shard_problems(info, own.get(str(term.label)))
        found += [f"{term.label}: {problem}" for problem in problems]
    if found:
        raise ValueError(f"objective: streams has a shard of the sequence: {'; '.join(found)}")


@dataclass(frozen=True, kw_only=True)
class HeadTerm(Objective):
    """A cross-entropy against the unembedding: declares rows, the plan computes them together with
    the others'."""

    predicts_tokens: ClassVar[bool] = True

    @property
    def penalties(self) -> tuple[float, float]:
        """Label smoothing and z-loss of its rows, as in `CrossEntropyTerm`."""
        return 0.0, 0.0

    def rows(self, streams: Streams, context: Context) -> dict[str, HeadRows]:
        """``{part: rows}``, with the parts and the rows that `valid` counts."""
        raise NotImplementedError

    def own_states(self) -> int:
        """Sets of hidden states beside last_hidden that go through the head, for `explain`."""
        return 0


@dataclass(frozen=True, kw_only=True)
class LatentTerm(Objective):
    """A loss outside the vocabulary: computes its own sums, never an ``[N, V]`` tensor."""

    def sums(self, streams: Streams, context: Context) -> Mapping[str, LatentPart | HeadReading]:
        """``{part: what it computed}``, with the parts that `valid` counts."""
        raise NotImplementedError
