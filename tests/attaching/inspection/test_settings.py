"""Which changes of a model and its config make `LogitSettings` measure the logits again: any that a
setting had a part in, and no other."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from nitp_ops.attaching.inspection import logit_settings
from nitp_ops.attaching.inspection.logit_settings import LogitSettings
from nitp_ops.objectives import ModelInfo


class Config:
    """A config that may hold another one for its text, as those of transformers do."""

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)

    def get_text_config(self) -> Any:
        return vars(self).get("text_config", self)


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.base_model, self.names = config, nn.Linear(2, 2), ["a"]
        self.bound = self.eval  # pickle knows the method, but not its type


def plain() -> Model:
    return Model(Config(softcap=None, scale=1.0, flag=True, text_config=Config(softcap=30.0)))


def newer_text(model: Any) -> None:
    text: Any = Config(softcap=30.0)
    model.config.text_config = text
    measured_again(model)  # nothing has changed yet
    text.softcap = 50.0


def own_text(model: Any) -> None:
    model.config = config = Config(softcap=None)
    measured_again(model)
    vars(config)["text_config"] = Config(softcap=30.0)


def newer_base(model: Any) -> None:
    model.base_model = body = nn.Linear(2, 2)
    measured_again(model)
    setattr(body, "scale", 2.0)  # noqa: B010


CHANGES: dict[str, Callable[[Any], object]] = {
    "a number": lambda model: setattr(model.config, "scale", 2.0),
    "None that becomes a number": lambda model: setattr(model.config, "softcap", 30.0),
    "a number that becomes None": lambda model: setattr(model.config.text_config, "softcap", None),
    "a new field": lambda model: setattr(model, "logit_scale", 2.0),
    "a field that is gone": lambda model: delattr(model.config, "scale"),
    "a field of another name": lambda model: setattr(
        model.config, "factor", vars(model.config).pop("scale")
    ),
    "a field of the body": lambda model: setattr(model.base_model, "scale", 2.0),
    "another config of the same text": lambda model: setattr(
        model, "config", Config(scale=2.0, text_config=model.config.text_config)
    ),
    "another text config, later its field": newer_text,
    "a first text config": own_text,
    "another body, later its field": newer_base,
}
WATCHED: dict[int, LogitSettings] = {}


def measured_again(model: Any) -> bool:
    """Whether a pass measures; what it finds is what was measured at attach."""
    called: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        transform = SimpleNamespace(softcap=None, logit_scale=1.0)
        patch.setattr(logit_settings, "head_transform", lambda *_: called.append(1) or transform)
        patch.setattr(logit_settings, "plain_forward", lambda _: None)
        WATCHED[id(model)].check(model)
    return bool(called)


def watched(model: Any) -> Any:
    WATCHED.clear()
    sites: Any = None
    WATCHED[id(model)] = LogitSettings(
        model, sites, ModelInfo(hidden_size=2, vocab_size=2, num_layers=1)
    )
    return model


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_a_setting_is_measured_once(change: Callable[[Any], object]):
    model = watched(plain())
    assert not measured_again(model)
    change(model)
    assert measured_again(model) and not measured_again(model)


def test_other_changes_are_not_measured():
    model = watched(plain())
    model.names, model.config.scale, model.cache = ["b"], 1, {}
    model.eval()
    assert not measured_again(model) and not measured_again(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_watches_the_copy(copied: Callable[[Any], Any]):
    model = watched(plain())
    model, settings = copied((model, WATCHED[id(model)]))
    WATCHED[id(model)] = settings
    assert not measured_again(model)
    model.config.softcap = 30.0
    assert measured_again(model)
