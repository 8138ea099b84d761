"""Which of torchtitan's models take an objective: every flavor of every family, on the meta device."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchtitan")

import torchtitan.models
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.deepseek_v3 import model_registry

from nitp_ops.trainers.torchtitan import attach_decoder

pytestmark = [pytest.mark.trainers, pytest.mark.filterwarnings("ignore")]
DOCS = Path(__file__).parents[2] / "docs/trainers.md"
#: {family: (name of its table of flavors, what it is refused for)}
FAMILIES = {
    "llama3": ("llama3_configs", None),
    "qwen3": ("qwen3_configs", None),
    "gpt_oss": ("gptoss_configs", None),
    "deepseek_v3": ("deepseekv3_configs", None),
    "kimi_k2_7": ("kimi_k2_5_configs", "model is a KimiK25Model with a forward of its own"),
    "muse_glimmer": (
        "muse_glimmer_configs",
        "model is a MuseGlimmerModel with a forward of its own",
    ),
}
#: No language model, and one that can not be imported without the package fla.
OTHERS = {"flux", "qwen3_5"}


def on_meta(registry: Any, flavor: str, **options: Any) -> Any:
    with torch.device("meta"):
        return registry(flavor, **options).model.build()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_flavor_is_served_or_refused_by_name(family):
    table, refusal = FAMILIES[family]
    module = import_module(f"torchtitan.models.{family}")
    for flavor in getattr(module, table):
        model = on_meta(module.model_registry, flavor)
        if refusal is None:
            objective = attach_decoder(model, "ntp + 0.8*nitp(target_layer=1) + 0.3*mtp_sequential")
            assert model.nitp_objective is objective
        else:
            with pytest.raises(
                TypeError, match=f"^torchtitan: {refusal}, expected that of Decoder$"
            ):
                attach_decoder(model, "ntp")


def test_the_page_names_every_family_and_no_other_exists():
    folder = Path(torchtitan.models.__file__).parent
    assert {
        f.name for f in folder.iterdir() if (f / "model").exists() or (f / "model.py").exists()
    } == (FAMILIES.keys() | OTHERS)
    section = DOCS.read_text().partition("\n## torchtitan")[2].partition("\n## ")[0]
    assert all(f"`{family}`" in section for family in FAMILIES)


def test_its_own_mtp_layers_are_refused_with_the_objective_that_has_them():
    model = on_meta(model_registry, "debugmodel", num_mtp_layers=2)
    with pytest.raises(ValueError) as caught:
        attach_decoder(model, "ntp")
    advice = "ntp + 0.3*mtp_sequential(depth=2, source=last_residual)"
    assert str(caught.value) == (
        "torchtitan: model is a DeepSeekV3Model with 2 MTP layers, expected num_mtp_layers=0: the "
        "objective has such "
        f'layers of its own, "{advice}"'
    )
    attach_decoder(on_meta(model_registry, "debugmodel"), advice)


def test_a_subclass_with_another_forward_is_refused():
    class Other(Decoder):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = on_meta(import_module("torchtitan.models.llama3").model_registry, "debugmodel")
    model.__class__ = Other
    with pytest.raises(TypeError, match="model is a Other with a forward of its own"):
        attach_decoder(model, "ntp")
