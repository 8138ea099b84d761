"""Settings of a model and its config, such as a softcap, that change after attach: refused where
the logits change."""

from __future__ import annotations

import math
from typing import Any

from nitp_ops.attaching.attached_forward import plain_forward
from nitp_ops.attaching.hook_points import Sites, text_config
from nitp_ops.objectives import ModelInfo

from .logit_transform import Transform, head_transform

_Settings = dict[tuple[str, str], object]


class LogitSettings:
    """The settings that the softcap and the logit scale were measured under.

    Args:
        plain: the model. sites: its body and its head. info: holds what was measured at attach.
    """

    def __init__(self, plain: Any, sites: Sites, info: ModelInfo) -> None:
        self._sites, self._measured = sites, (info.softcap, info.logit_scale)
        self._remember(plain)

    def check(self, plain: Any) -> None:
        """Measure again if any setting is another one than at the last measurement; most have no
        part in the logits.

        Raises:
            ValueError: the logits are another function of what the head returns now.
        """
        if self._unchanged(plain):
            return
        now = _settings(plain)
        if now == self._seen:
            self._remember(plain)
            return
        changed = [key for key in now | self._seen if now.get(key) != self._seen.get(key)]
        names = ", ".join(f"{owner}.{name}" for owner, name in changed)
        try:
            transform = head_transform(plain, plain_forward(plain), self._sites)
        except ValueError as error:
            reason = str(error).removeprefix("attach: ")
            raise ValueError(
                f"attach: after attach {names} changed: {reason} (or attach after that change)"
            ) from error
        if not self._is_same(transform):
            before, after = (
                f"softcap {cap}, logit_scale {scale:g}"
                for cap, scale in (self._measured, transform[1:])
            )
            raise ValueError(
                f"attach: {names} changed after attach, the logits' {before} became {after}, "
                "expected attach after that change (handle.detach() first)"
            )
        self._remember(plain)

    def __getstate__(self) -> dict[str, Any]:
        """Without what only saves a look: kinds of fields need not be known elsewhere."""
        return {**vars(self), "_fields": None}

    def _remember(self, plain: Any) -> None:
        self._seen, holders = _settings(plain), [holder for _, holder in _holders(plain)]
        self._config, self._text, _, self._base = holders
        self._fields: list[_Fields] | None = [
            _Fields(holder) for holder in {id(holder): holder for holder in holders}.values()
        ]

    def _unchanged(self, plain: Any) -> bool:
        """Whether nothing at all was set since the last look: most passes need no more than this."""
        config = plain.config
        # a config that is its own text config has no other one before its fields change
        same = config is self._config and (config is self._text or text_config(plain) is self._text)
        if not same or plain.base_model is not self._base or self._fields is None:
            return False
        return all(fields.unchanged() for fields in self._fields)

    def _is_same(self, transform: Transform) -> bool:
        (softcap, scale), now = self._measured, transform
        if softcap is None or now.softcap is None:
            same = softcap is now.softcap
        else:
            same = math.isclose(softcap, now.softcap, rel_tol=1e-4)
        # a factor on bfloat16 is rounded
        return same and math.isclose(scale, now.logit_scale, rel_tol=1e-2)


class _Fields:
    """The fields of one object and the numbers, flags and words among them."""

    def __init__(self, holder: Any) -> None:
        fields = _fields(holder)
        self._holder, self._kinds = holder, list(map(type, fields.values()))
        self._watched = [name for name, value in fields.items() if _is_setting(name, value)]
        self._values = list(map(fields.get, self._watched))

    def unchanged(self) -> bool:
        fields = _fields(self._holder)
        same_kinds = list(map(type, fields.values())) == self._kinds
        return same_kinds and list(map(fields.get, self._watched)) == self._values


def _fields(holder: Any) -> dict[str, Any]:
    """``vars(holder)``, which a config of transformers answers in Python."""
    return object.__getattribute__(holder, "__dict__")


def _is_setting(name: str, value: object) -> bool:
    return isinstance(value, (bool, int, float, str)) and name != "training"


def _holders(plain: Any) -> list[tuple[str, Any]]:
    """(path, object) of what may hold a setting that the logits depend on; two paths may lead to
    one."""
    return [
        ("config", plain.config),
        ("config.get_text_config()", text_config(plain)),
        ("model", plain),
        ("model.base_model", plain.base_model),
    ]


def _settings(plain: Any) -> _Settings:
    holders = {id(holder): (path, holder) for path, holder in reversed(_holders(plain))}
    return {
        (path, name): value
        for path, holder in holders.values()
        for name, value in vars(holder).items()
        if _is_setting(name, value)
    }
