"""Settings of a model and its config, such as a softcap, that change after attach: refused where the logits change."""

from __future__ import annotations

import math
from typing import Any

from nitp_ops.objectives import ModelInfo

from .attached_forward import plain_forward
from .head_transform import Transform, head_transform
from .sites import Sites, text_config

_Settings = dict[tuple[str, str], object]


class LogitSettings:
    """The settings that the softcap and the logit scale were measured under.

    Args:
        plain: the model. sites: its body and its head. info: holds what was measured at attach.
    """

    def __init__(self, plain: Any, sites: Sites, info: ModelInfo) -> None:
        self._sites, self._measured, self._seen = sites, (info.softcap, info.logit_scale), _settings(plain)

    def check(self, plain: Any) -> None:
        """Measure again if any setting is another one than at the last measurement; most have no part in the logits.

        Raises:
            ValueError: the logits are another function of what the head returns now.
        """
        now = _settings(plain)
        if now == self._seen:
            return
        changed = [key for key in now | self._seen if now.get(key) != self._seen.get(key)]
        names = ", ".join(f"{owner}.{name}" for owner, name in changed)
        try:
            transform = head_transform(plain, plain_forward(plain), self._sites)
        except ValueError as error:
            reason = str(error).removeprefix("attach: ")
            raise ValueError(f"attach: after attach {names} changed: {reason} (or attach after that change)") from error
        if not self._is_same(transform):
            before, after = (f"softcap {cap}, logit_scale {scale:g}" for cap, scale in (self._measured, transform[1:]))
            raise ValueError(
                f"attach: {names} changed after attach, the logits' {before} became {after}, expected attach after "
                "that change (handle.detach() first)"
            )
        self._seen = now

    def _is_same(self, transform: Transform) -> bool:
        (softcap, scale), now = self._measured, transform
        if softcap is None or now.softcap is None:
            same = softcap is now.softcap
        else:
            same = math.isclose(softcap, now.softcap, rel_tol=1e-4)
        return same and math.isclose(scale, now.logit_scale, rel_tol=1e-2)  # a factor on bfloat16 is rounded


def _settings(plain: Any) -> _Settings:
    places = (
        ("config", plain.config),
        ("config.get_text_config()", text_config(plain)),
        ("model", plain),
        ("model.base_model", plain.base_model),
    )
    holders = {id(holder): (path, holder) for path, holder in reversed(places)}  # two paths may lead to one
    return {
        (path, name): value
        for path, holder in holders.values()
        for name, value in vars(holder).items()
        if isinstance(value, (bool, int, float, str)) and name != "training"
    }
