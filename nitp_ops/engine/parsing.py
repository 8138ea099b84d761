"""A spec: which objectives, with which options. Three equal spellings, one frozen form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from nitp_ops.engine.base import Objective
from nitp_ops.engine.registry import NAME, find
from nitp_ops.engine.streams.model_info import ModelInfo

from .spec.grammar import parse_expression
from .spec.schedule import Piecewise, Ramp
from .spec.validation import MOST_TERMS, SpecError, shown, suggestion, too_many_terms

#: Of one term: more than any objective has.
_MOST_OPTIONS = 100
#: Its own attributes are no labels: terms with parameters are its entries.
_MODULES = nn.ModuleDict()


@dataclass(frozen=True)
class Spec:
    """Objectives in declaration order, each with its label; made by `parse`, compared by value.

    Args:
        terms: dataclasses of objectives; a missing label becomes the registered name.

    Raises:
        SpecError: no term, more than 100, two terms of one label, a label that cannot name
            parameters, ``denominator="main"`` without an ntp term, terms that conflict.
    """

    terms: tuple[Objective, ...]

    def __post_init__(self) -> None:
        if len(self.terms) > MOST_TERMS:
            raise SpecError([too_many_terms(len(self.terms))])
        named = tuple(
            term if term.label is not None else dataclasses.replace(term, label=term.name)
            for term in self.terms
        )
        object.__setattr__(self, "terms", named)
        found = [] if named else ["the spec is empty, expected at least one objective"]
        seen: set[str | None] = set()
        for index, term in enumerate(named):
            label = str(term.label)
            if label in seen:
                found.append(
                    f'{label}: the label is given twice, expected "other: {term.name}" '
                    "for one of them"
                )
            seen.add(label)
            if not NAME.fullmatch(label) or label == "loss" or hasattr(_MODULES, label):
                found.append(
                    f'"{label}" is no label, expected an identifier that names no '
                    "attribute of a module"
                )
            if term.denominator == "main" and self.main_label is None:
                found.append(f'{label}: denominator is "main", expected an ntp term to divide by')
            found += [
                f"{label}: {line}" for line in term.conflicts(named[:index] + named[index + 1 :])
            ]
        if found:
            raise SpecError(found)

    @property
    def main_label(self) -> str | None:
        """Label of the first ntp term, whose count is the main denominator."""
        return next((term.label for term in self.terms if term.name == "ntp"), None)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The mapping that spells this spec, every option explicit; it survives JSON.

        Example:
            >>> parse("0.5*cosine_regularizer").to_dict()["cosine_regularizer"]
            {'weight': 0.5, 'denominator': 'own', 'eps': 1e-06}
        """
        return {str(term.label): _options(term) for term in self.terms}


SpecLike: TypeAlias = str | Mapping[str, Any] | Sequence[Objective] | Objective | Spec


def parse(spec: SpecLike, model: ModelInfo | None = None) -> Spec:
    """The frozen spec of any spelling.

    * expression: ``"ntp + 0.8*nitp(target_layer=0.2) + late: 0.1*nitp(target_layer=8)"``;
    * mapping, as YAML, TOML or JSON give it: ``{"ntp": {}, "late": {"type": "nitp", "weight":
      0.1}}``, where a key is a label and `type` the objective, which a key that is its name may
      leave out;
    * dataclasses: ``[NTP(), NITP(weight=0.8), NITP(label="late", weight=0.1, target_layer=8)]``.

    Raises:
        SpecError: everything that is wrong with the spec, in its ``problems``; with a model also
            what does not fit it.
        TypeError: not a spec at all.

    Example:
        >>> parse("ntp + 0.8*nitp") == parse({"ntp": {}, "nitp": {"weight": 0.8}})
        True
    """
    if isinstance(spec, Spec):
        spec = spec.terms
    if isinstance(spec, Objective):
        spec = [spec]
    problems: list[str] = []
    terms: list[Objective] = []
    if (
        isinstance(spec, Mapping | Sequence)
        and not isinstance(spec, str)
        and len(spec) > MOST_TERMS
    ):
        raise SpecError([too_many_terms(len(spec))])
    if isinstance(spec, str):
        parsed, problems = parse_expression(spec)
        entries = [(term.label, term.name, term.options) for term in parsed]
    elif isinstance(spec, Mapping):
        found = [_entry(key, value, problems) for key, value in spec.items()]
        entries = [entry for entry in found if entry is not None]
    elif isinstance(spec, Sequence):
        entries = []
        for item in spec:
            if isinstance(item, Objective) and item.name and find(item.name) is type(item):
                terms.append(item)
            else:
                problems.append(
                    f"{shown(item)} is no registered objective, expected dataclasses like NTP()"
                )
    else:
        raise TypeError(
            f"parse: spec is a {type(spec).__name__}, expected an expression, a mapping or a list"
        )
    for label, name, options in entries:
        try:
            terms.append(_construct(label, name, options))
        except SpecError as error:
            problems += error.problems
    if model is not None:
        for term in terms:
            found = [*term.model_problems(model), *_past_the_end(term, model.sequence_length)]
            problems += [f"{term.label or term.name}: {line}" for line in found]
    try:
        whole = Spec(tuple(terms)) if terms or not problems else None
    except SpecError as error:
        problems += error.problems
    if problems:
        raise SpecError(problems)
    assert whole is not None
    return whole


def _entry(
    key: object, value: object, problems: list[str]
) -> tuple[str | None, str, dict[str, Any]] | None:
    """(label, name, options); problems go to the list, None where there is no label or no name."""
    if not isinstance(key, str):
        problems.append(f"{shown(key)} is no label, expected a string")
        return None
    options = dict(value) if isinstance(value, Mapping) else {}
    if value is not None and not isinstance(value, Mapping):
        problems.append(f"{key}: the options are {shown(value)}, expected a mapping")
    if "label" in options:
        problems.append(f"{key}: label is {shown(options.pop('label'))}, expected it as the key")
    name = options.pop("type", key)
    if not isinstance(name, str):
        problems.append(f"{key}: type is {shown(name)}, expected the name of an objective")
        return None
    return key, name, options


def _word(key: object) -> str:
    return f'"{key}"' if isinstance(key, str) else shown(key)


def _construct(label: str | None, name: str, options: dict[str, Any]) -> Objective:
    try:
        cls = find(name)
    except SpecError as error:
        raise SpecError(
            f"{label}: {line}" if label not in (None, name) else line for line in error.problems
        ) from None
    if len(options) > _MOST_OPTIONS:
        raise SpecError(
            [f"{label or name}: {len(options)} options, expected at most {_MOST_OPTIONS}"]
        )
    known = [field.name for field in dataclasses.fields(cls)]
    offered = [option for option in known if option != "label"]
    problems = [
        f"{label or name}: {_word(key)} is no option, expected one of "
        f"{', '.join(offered)}.{suggestion(key, offered)}"
        for key in options
        if key not in known
    ]
    given = {key: value for key, value in options.items() if key in known}
    try:
        term = cls(label=name if label is None else label, **given)
    except SpecError as error:
        raise SpecError([*problems, *error.problems]) from None
    if problems:
        raise SpecError(problems)
    return term


def _options(term: Objective) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, Ramp | Piecewise):
            return value.to_json()
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    fields = [field.name for field in dataclasses.fields(term) if field.name != "label"]
    kind = {} if term.label == term.name else {"type": term.name}
    return kind | {name: plain(getattr(term, name)) for name in fields}


def _past_the_end(term: Objective, length: int | None) -> list[str]:
    k = term.max_offset()
    if length is None or k < length:
        return []
    return [
        f"the target x_(t+{k}) lies past every sequence, expected at most t+{length - 1} (T = "
        f"{length})"
    ]
