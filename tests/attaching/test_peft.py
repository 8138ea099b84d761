"""attach on what PEFT makes of a model: prompts, prefixes, copies of the head, adapters that are
switched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from torch import Tensor

import nitp_ops
from tests.support.hugging_face_cases import batch, gradients, make

pytestmark = pytest.mark.trainers
TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
PROMPT: dict[str, Any] = TASK | {"num_virtual_tokens": 4}


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**TASK, init_lora_weights=False, **options)


KINDS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "prompt tuning": (peft.PromptTuningConfig(**PROMPT), {}, {}),
    "p-tuning": (peft.PromptEncoderConfig(encoder_hidden_size=8, **PROMPT), {}, {}),
    "several tasks": (
        peft.MultitaskPromptTuningConfig(num_tasks=2, **PROMPT), {}, {"task_ids": torch.zeros(3, dtype=torch.long)},
    ),
    "prefix tuning": (peft.PrefixTuningConfig(**PROMPT), {}, {}),
    "IA3": (peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK), {}, {}),
    "LoRA on the embedding": (lora(target_modules=["embed_tokens", "q_proj"]), {}, {}),
    "a copy of the head": (lora(modules_to_save=["lm_head"]), {}, {}),
    "a tied copy of the head": (
        lora(modules_to_save=["lm_head"], ensure_weight_tying=True), {"tie_word_embeddings": True}, {},
    ),
    "a tied copy of the embedding": (
        lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), {"tie_word_embeddings": True}, {},
    ),
}  # fmt: skip


def model_of(kind: str) -> tuple[Any, dict[str, Tensor]]:
    config, changes, more = KINDS[kind]
    torch.manual_seed(3)
    return peft.get_peft_model(
        make("llama", dtype=torch.float32, **changes), config
    ).double(), batch() | more


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_every_gradient_are_those_of_peft(kind: str, masked: bool):
    model, given = model_of(kind)
    if not masked:
        del given["attention_mask"]
    plain = model(**given).loss
    expected = gradients(plain, model)
    nitp_ops.attach(model, "ntp")
    loss = model(**given).loss
    torch.testing.assert_close(loss, plain.double(), rtol=1e-6, atol=1e-6)
    found = gradients(loss, model)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        # PEFT's own loss is made of float32 logits
        error = (value - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("kind", KINDS)
def test_the_counts_of_a_batch_are_those_of_its_pass(kind: str):
    """Virtual tokens of a prompt are pairs of NITP, and the last one predicts the first token."""
    model, given = model_of(kind)
    handle = nitp_ops.attach(model, "ntp + 0.8*nitp(target_layer=1)")
    first = model(**given).loss
    counts = handle.count(given)
    assert handle.metrics is not None
    assert {part: int(count) for part, count in counts.items()} == {
        part: handle.metrics.compute()[f"{part}/count"] for part in ("ntp", "nitp")
    }
    handle.set_counts(counts)
    torch.testing.assert_close(model(**given).loss, first, rtol=0, atol=0)


def test_switching_adapters_and_switching_them_off_moves_the_head_too():
    model, given = model_of("a copy of the head")
    model.add_adapter("other", lora(modules_to_save=["lm_head"]))
    model.add_adapter("without a head", lora())
    copies = model.get_output_embeddings().modules_to_save
    with torch.no_grad():
        for step, copy in enumerate(copies.values(), start=1):
            copy.weight += step * torch.linspace(-1, 1, copy.weight.numel()).view_as(copy.weight)
    model.double()
    nitp_ops.attach(model, "ntp")

    def pair() -> tuple[float, float]:
        return model.train()(**given).loss.item(), model.eval()(**given).loss.item()

    seen = []
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        seen.append(pair())
        with model.disable_adapter():
            seen.append(pair())
    model.base_model.set_adapter("without a head")
    seen.append(pair())
    for trained, evaluated in seen:
        assert trained == pytest.approx(evaluated, rel=1e-6)
    values = [round(trained, 6) for trained, _ in seen]
    assert values[1] == values[3] and len(set(values)) >= 3


def test_a_wrapper_that_keeps_the_models_own_forward_is_refused_at_attach():
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, **TASK)
    model = peft.get_peft_model(make("llama"), config)
    with pytest.raises(
        ValueError,
        match="AdaptionPromptModel around the model calls a forward of it that it has kept",
    ):
        nitp_ops.attach(model, "ntp")


def test_an_adapter_whose_loss_peft_makes_from_the_logits_is_refused_at_attach():
    config = peft.CPTConfig(
        cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4], **TASK
    )
    model = peft.get_peft_model(make("llama"), config)
    with pytest.raises(
        ValueError,
        match="adapter 'default' is of the type CPT, whose loss PEFT makes from the logits",
    ):
        nitp_ops.attach(model, "ntp")
    assert not hasattr(model.get_base_model(), "nitp_objective")


def test_a_mask_of_floats_and_one_of_cached_keys_too_say_what_attention_reads():
    model, given = make("llama"), batch()
    handle = nitp_ops.attach(model, "ntp + nitp")
    counts = handle.count(given)
    mask = given["attention_mask"]
    for other in (
        mask.float(),
        mask.bool(),
        mask * 0.5,
        torch.cat([torch.ones(3, 4), mask], dim=1),
    ):
        assert handle.count(given | {"attention_mask": other}) == counts
