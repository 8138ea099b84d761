"""`python -m nitp_ops.engine.reports.pages > docs/objectives.md`: the registry as a page."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re

from nitp_ops.engine.base import HeadTerm, Objective
from nitp_ops.engine.explain import facts
from nitp_ops.engine.registry import available, find, plugin_of
from nitp_ops.engine.spec.validation import field_types, type_name
from nitp_ops.engine.streams.model_info import ModelInfo

_INFO = ModelInfo(hidden_size=1280, vocab_size=152064, num_layers=24)
_COMMON = {field.name for field in dataclasses.fields(Objective)}
_HEAD = f"""# Objectives

Written by `python -m nitp_ops.engine.reports.pages` from the registry. Every objective also has `weight`, `denominator`
and a label. Costs are those of a float32 model with d = {_INFO.hidden_size}, V = {_INFO.vocab_size} and
{_INFO.num_layers} blocks.
"""


def page() -> str:
    """docs/objectives.md: the objectives of this package, in the order of their names."""
    classes = [find(name) for name in available() if plugin_of(name) is None]
    return "\n".join(
        [
            _HEAD,
            *(
                _section(cls)
                for cls in classes
                if cls.__module__.startswith("nitp_ops.objectives.")
            ),
        ]
    )


def _section(cls: type[Objective]) -> str:
    blocks = re.split(
        r"^(Args|Raises|Example|Source):", inspect.getdoc(cls) or "", flags=re.MULTILINE
    )
    text = {"": blocks[0], **dict(zip(blocks[1::2], blocks[2::2], strict=True))}
    kind = "head term" if issubclass(cls, HeadTerm) else "latent term"
    lines = [f"## {cls.name}", "", f"`{cls.__name__}`, a {kind}.", "", text[""].strip(), ""]
    own = [field for field in dataclasses.fields(cls) if field.name not in _COMMON]
    if own:
        types = field_types(cls)
        lines += ["| option | values | default |", "| --- | --- | --- |"]
        lines += [
            f"| {f.name} | {type_name(types[f.name])} | `{_written(f.default)}` |" for f in own
        ]
        lines += ["", *_bullets(text["Args"]), ""]
    resolved = facts(cls(), _INFO)
    lines += [
        f"* {name}: {resolved[name]}" for name in resolved if name not in ("weight", "denominator")
    ]
    # single backticks are Markdown's form of code
    prose = "\n".join(lines).replace("``", "`")
    example = inspect.cleandoc(text["Example"])
    return f"{prose}\n\n```python\n{example}\n```\n\nSource: {text['Source'].strip()}\n"


def _bullets(text: str) -> list[str]:
    """One bullet an entry; what is indented further belongs to the entry before."""
    entries: list[str] = []
    for line in inspect.cleandoc(text).splitlines():
        if line.startswith(" ") and entries:
            entries[-1] += f"\n  {line.strip()}"
        else:
            entries.append(f"* {line}")
    return entries


def _written(value: object) -> str:
    """A default as a spec writes it."""
    words = {True: "true", False: "false", None: "null"}
    return words[value] if isinstance(value, bool) or value is None else str(value)


if __name__ == "__main__":
    importlib.import_module("nitp_ops.objectives")  # it offers the built-in ones
    print(page(), end="")
