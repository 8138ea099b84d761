"""Which modules a training pass really runs: taken, or refused at attach with the reason, never at
the first step."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import nitp_ops
from nitp_ops.attaching.hook_points import hugging_face_sites
from nitp_ops.attaching.inspection.block_pass import checked_blocks
from nitp_ops.objectives import SpecError
from tests.support.hugging_face_cases import FAMILIES, SIZES, assert_equal_training, batch, make

pytestmark = pytest.mark.trainers
STATES = "ntp + 0.8*nitp(target_layer=1)"
RESIDUAL = "ntp + 0.8*nitp(target_layer=1, source=last_residual)"
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
MORE: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
        "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 3, "layer_types": ["full_attention"] * 3,
    },
    "deepseek_v4": {
        "q_lora_rank": 16, "qk_rope_head_dim": 8, "o_lora_rank": 8, "o_groups": 2, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "sliding_window": 16,
    },
    "longcat_flash": LATENT | {
        "num_layers": 3, "num_hidden_layers": 6, "num_key_value_heads": 4, "n_routed_experts": 4, "moe_topk": 2,
        "zero_expert_num": 2, "expert_ffn_hidden_size": 16, "ffn_hidden_size": 48,
    },
    "glm_moe_dsa": LATENT | {
        "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16, "index_topk": 4, "index_head_dim": 8,
        "index_n_heads": 2,
    },
    "hrm_text": {"num_layers_per_stack": 3},
    "bart": {
        "d_model": 32, "decoder_layers": 3, "decoder_ffn_dim": 48, "decoder_attention_heads": 4, "encoder_layers": 2,
        "encoder_attention_heads": 4,
    },
    "reformer": {
        "attn_layers": ["local"] * 3, "axial_pos_embds": False, "feed_forward_size": 48, "is_decoder": True,
        "local_attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "local_attn_chunk_length": 5,
        "attention_head_size": 8,
    },
    "reformer_axial": {
        "attn_layers": ["local"] * 3, "axial_pos_shape": [4, 4], "axial_pos_embds_dim": [16, 16], "is_decoder": True,
        "local_attn_chunk_length": 4, "attention_head_size": 8,
    },
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.0},
    "bert": {"is_decoder": True},
}  # fmt: skip


def tiny(family: str, **changes: Any) -> Any:
    """A decoder whose weights are all drawn, or the model that its family builds for causal
    language models."""
    torch.manual_seed(0)
    kind = transformers.CONFIG_MAPPING[family.removesuffix("_axial")]
    config = kind(**{**SIZES, **MORE.get(family, {}), **changes})
    kinds = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_config(config, **kinds).double().train()


def with_images(family: str) -> Any:
    """Towers for text and for images of equal depth."""
    torch.manual_seed(0)
    config: Any = transformers.CONFIG_MAPPING[family]
    text = {
        **SIZES,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32,
              "deepstack_visual_indexes": [0, 1, 2], "patch_size": 8, "num_hidden_layers": 3, "image_size": 16,
              "num_attention_heads": 4}  # fmt: skip
    if family == "llava":
        text, vision = (
            {**SIZES, "model_type": "llama"},
            {**vision, "model_type": "clip_vision_model"},
        )
    made = transformers.AutoModelForImageTextToText.from_config(
        config(text_config=text, vision_config=vision)
    )
    return made.double().train()


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "llava"])
def test_beside_a_tower_for_images_the_blocks_are_those_of_the_text(family: str):
    model, given = with_images(family), batch()
    nitp_ops.attach(model, RESIDUAL).detach()
    handle = nitp_ops.attach(model, STATES)
    sites = handle._tap.sites
    assert (
        sites.blocks == tuple(model.model.language_model.layers) == hugging_face_sites(model).blocks
    )
    assert sites.norm is model.model.language_model.norm is hugging_face_sites(model).norm
    assert_equal_training(model, given, given["attention_mask"].long() - 1, handle)


@pytest.mark.parametrize(
    ("family", "spec", "reason"),
    [
        (
            "gemma3n_text",
            STATES,
            r"its blocks receive a tensor of shape \(4, 1, 4, 32\), expected "
            r"\(1, 4, 32\)",
        ),
        (
            "deepseek_v4",
            STATES,
            r"its blocks receive a tensor of shape \(1, 4, 4, 32\), expected "
            r"\(1, 4, 32\)",
        ),
        (
            "reformer",
            STATES,
            r"its blocks receive a tensor of shape \(1, 4, 32\), expected \(1, "
            r"4, 64\)",
        ),
        (
            "reformer_axial",
            STATES,
            r"its blocks receive a tensor of shape \(1, 16, 32\), expected "
            r"\(1, 16, 64\)",
        ),
        (
            "reformer_axial",
            "ntp + next_embedding",
            r"its blocks receive a tensor of shape \(1, "
            r"16, 32\), expected",
        ),
        (
            "hrm_text",
            STATES,
            r"its 3 blocks run \d+ times in a pass, expected each once and in "
            r"order",
        ),
        (
            "nanochat",
            RESIDUAL,
            r"its final norm runs 2 times in a pass, expected once, after the "
            r"last block",
        ),
        (
            "nanochat",
            "ntp + mtp_sequential(source=last_residual)",
            r"its final norm runs 2 times "
            r"in a pass",
        ),
    ],
)
def test_streams_that_no_module_passes_once_are_refused_at_attach(
    family: str, spec: str, reason: str
):
    model = tiny(family)
    modes = [module.training for module in model.modules()]
    with pytest.raises(
        ValueError,
        match=r"is required, but the \w+ does not offer it: "
        rf"{reason}.*collect it with tap",
    ):
        nitp_ops.attach(model, spec)
    assert not hasattr(model, "nitp_objective") and "forward" not in model.__dict__
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("spec", ["ntp + nextlat", "ntp + mtp_sequential"])
@pytest.mark.parametrize("family", ["reformer", "reformer_axial"])
def test_what_reads_an_embedding_of_another_width_than_the_heads_is_refused_at_attach(
    family: str, spec: str
):
    expected = r"^attach: \w+ reads the embedding, which is 32 wide in the ReformerModelWithLMHead, expected 64"
    with pytest.raises(ValueError, match=expected):
        nitp_ops.attach(tiny(family), spec)


def test_a_body_that_runs_on_no_ids_alone_offers_no_states_and_trains_on_next_tokens():
    model, given = make("llama"), batch()
    run = model.model.forward

    @functools.wraps(run)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("attention_mask") is None:
            raise ValueError("attention_mask is needed")
        return run(*args, **kwargs)

    model.model.forward = forward
    expected = (
        r"its body runs on no ids alone, .* not known \(ValueError: attention_mask is needed\)"
    )
    with pytest.raises(ValueError, match=expected):
        nitp_ops.attach(model, STATES)
    plain = model(**given).loss
    nitp_ops.attach(model, "ntp")
    torch.testing.assert_close(model(**given).loss, plain, check_dtype=False, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "family", ["gemma3n_text", "deepseek_v4", "reformer", "hrm_text", "nanochat", "longcat_flash"]
)
def test_the_loss_of_next_tokens_alone_is_that_of_the_plain_model(family: str):
    model, given = tiny(family), batch()
    del given["attention_mask"]
    plain = model(**given, use_cache=False).loss
    nitp_ops.attach(model, "ntp")
    torch.testing.assert_close(model(**given).loss, plain, check_dtype=False, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "glm_moe_dsa"])
def test_a_pass_over_ids_finds_blocks_that_return_a_tensor_or_a_tuple(family: str):
    model = make(family) if family in FAMILIES else tiny(family)
    structural = hugging_face_sites(model)
    found, reasons = checked_blocks(model, replace(structural, blocks=None, norm=None))
    assert found.blocks == structural.blocks is not None
    assert (found.norm is structural.norm) == (reasons == {}) == (family != "nanochat")


def test_blocks_that_the_config_counts_otherwise_are_found_by_running_them():
    model, given = tiny("longcat_flash"), batch()
    handle = nitp_ops.attach(model, STATES)
    assert handle.objective.info.num_layers == 3
    assert_equal_training(model, given, given["attention_mask"].long() - 1, handle)


def test_a_block_that_runs_twice_is_refused_at_attach():
    model = make("llama")
    model.model.layers[2] = model.model.layers[1]
    with pytest.raises(
        ValueError, match="its 3 blocks run 3 times in a pass, expected each once and in order"
    ):
        nitp_ops.attach(model, STATES)
    nitp_ops.attach(model, "ntp")


def test_blocks_that_training_leaves_out_are_refused_at_attach():
    model = tiny("opt", layerdrop=0.5)
    with pytest.raises(
        ValueError,
        match=r"its layerdrop is 0\.5, so that training passes leave "
        r"blocks out",
    ):
        nitp_ops.attach(model, STATES)


@pytest.mark.parametrize("family", ["bart", "xlm"])
def test_a_loss_that_is_computed_in_the_forward_is_refused_by_that_name(family: str):
    with pytest.raises(
        ValueError,
        match=r"attach: the \w+'s loss does not go through "
        r"model\.loss_function",
    ):
        nitp_ops.attach(tiny(family), "ntp")


def test_offsets_past_the_longest_sequence_of_the_config_are_refused():
    with pytest.raises(SpecError, match="64"):
        nitp_ops.attach(make("llama"), "ntp + mtp_parallel(offsets=[2, 64])")


def test_a_scale_that_is_no_rounding_of_one_is_kept_under_a_cap():
    model = make("llama")
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        return type(out)(**{**out, "logits": 5 * torch.tanh(1.05 * out.logits / 5)})

    model.forward = forward
    info = nitp_ops.attach(model, "ntp").objective.info
    assert (info.softcap, info.logit_scale) == (5.0, pytest.approx(1.05, rel=1e-5))


def test_a_model_whose_config_counts_no_layers_attaches_on_the_meta_device_too():
    """Blt: an encoder, a global transformer and a decoder, each with a config of its own."""
    with torch.device("meta"):
        model = transformers.BltForCausalLM(transformers.BltConfig())
    with pytest.raises(
        ValueError,
        match=r"^attach: blocks is None, .*hidden_states\[0\] is "
        r"required",
    ):
        nitp_ops.attach(model, "ntp + nitp")
    nitp_ops.attach(model, "ntp")
