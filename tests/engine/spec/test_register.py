"""Objectives of other packages: registered, or found as plugins."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nitp_ops.engine import registry
from nitp_ops.objectives import (
    NITP,
    NTP,
    Context,
    LatentPart,
    LatentTerm,
    ModelInfo,
    Need,
    SpecError,
    Streams,
    available,
    build,
    parse,
    register,
)
from tests.support.objectives_cases import INFO, make_batch


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    yield
    sys.modules.pop("extra_objective", None)


@pytest.mark.usefixtures("own_registry")
def test_a_third_party_objective_trains_beside_ours():
    @register("norm_penalty")
    @dataclass(frozen=True, kw_only=True)
    class NormPenalty(LatentTerm):
        power: int = 2

        def requires(self, info: ModelInfo) -> frozenset[Need]:
            return frozenset({Need("last_hidden")})

        def valid(self, streams: Streams) -> dict[str, Tensor]:
            return {"": torch.ones(streams.shape, dtype=torch.bool, device=streams.device)}

        def sums(self, streams: Streams, context: Context) -> dict[str, LatentPart]:
            assert streams.last_hidden is not None
            total = streams.last_hidden.norm(dim=-1).pow(self.power).sum()
            return {"": LatentPart(total / context.normalizer[""], total.detach())}

    assert "norm_penalty" in available()
    batch = make_batch()
    out = build("ntp + 0.5*norm_penalty(power=1)", model=INFO)(batch.streams())
    expected = (
        build("ntp", model=INFO)(batch.streams()).loss + 0.5 * batch.hidden.norm(dim=-1).mean()
    )
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.usefixtures("own_registry")
def test_an_objective_may_read_what_the_model_computed_itself():
    @register("balance")
    @dataclass(frozen=True, kw_only=True)
    class Balance(LatentTerm):
        def requires(self, info: ModelInfo) -> frozenset[Need]:
            return frozenset({Need("token_ids"), Need("external", name="router")})

        def valid(self, streams: Streams) -> dict[str, Tensor]:
            return {"": torch.ones(streams.shape, dtype=torch.bool)}

        def sums(self, streams: Streams, context: Context) -> dict[str, LatentPart]:
            total, _ = streams.external["router"]
            return {"": LatentPart(total / context.normalizer[""], total.detach())}

    objective = build("ntp + 0.01*balance", model=INFO)
    batch = make_batch()
    with pytest.raises(ValueError, match=r"streams lacks external\[router\]"):
        objective(batch.streams())
    out = objective(batch.streams(external={"router": (torch.tensor(42.0), torch.tensor(1))}))
    assert out.metrics.compute()["loss/balance"] == pytest.approx(0.01 * 42 / 21)


@pytest.mark.usefixtures("own_registry")
def test_an_unregistered_variant_of_an_objective_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Variant(NTP):
        pass

    with pytest.raises(SpecError, match="is no registered objective"):
        parse([Variant()])


@pytest.mark.usefixtures("own_registry")
def test_what_is_no_frozen_dataclass_cannot_be_registered():
    class Plain(NTP):
        pass

    @dataclass(frozen=True)
    class Positional(NTP):
        strength: float = 1.0

    with pytest.raises(TypeError, match="Plain is no frozen dataclass"):
        register("plain")(Plain)
    with pytest.raises(TypeError, match="positional fields strength, expected kw_only=True"):
        register("positional")(Positional)
    with pytest.raises(ValueError, match="expected one that NTP does not hold"):
        register("ntp")(NITP)
    with pytest.raises(ValueError, match="expected a Python identifier"):
        register("my objective")


def install(folder: Path, source: str) -> None:
    """A distribution "extra" with the entry point other = extra_objective:Other."""
    (folder / "extra_objective.py").write_text(source)
    meta = folder / "extra-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text("[nitp_ops.objectives]\nother = extra_objective:Other\n")


@pytest.mark.usefixtures("own_registry")
def test_a_plugin_is_listed_at_once_and_imported_when_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    install(
        tmp_path,
        "from dataclasses import dataclass\nfrom nitp_ops.objectives import NTP\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Other(NTP):\n    strength: float = 1.0\n",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "other" in available() and "extra_objective" not in sys.modules
    parse("ntp")
    assert "extra_objective" not in sys.modules
    assert parse("other(strength=2)").to_dict()["other"]["strength"] == 2.0


@pytest.mark.usefixtures("own_registry")
def test_a_broken_plugin_is_shown_when_it_is_named_and_harms_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    install(tmp_path, "raise RuntimeError('no license')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "other" in available()
    parse("ntp")
    with pytest.raises(
        SpecError,
        match=r'"other" is a plugin \(extra_objective:Other\) that does not load: .*no '
        r"license",
    ):
        parse("other")
