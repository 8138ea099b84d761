"""Tiny random Hugging Face models of many families, and the loss of "ntp + w nitp" written out from
their outputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# softcap and logit_scale are what the model's config says, and None and 1 where it says nothing
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {},
    "gemma2": {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"final_logit_softcapping": 4.0, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "mixtral": EXPERTS,
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "deepseek_v3": {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4,
    },
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
             "attn_pdrop": 0.0},
    "gpt_oss": EXPERTS | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "gpt_neox": {"num_key_value_heads": 4},
    "olmo2": {},
    "phi3": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.0},
    "minicpm3": {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
                 "dim_model_base": 16, "num_key_value_heads": 4},
    "nanochat": {"final_logit_softcapping": 3.0},
}  # fmt: skip


def make(
    family: str, *, dtype: torch.dtype = torch.float64, attention: str = "eager", **changes: Any
) -> Any:
    """A model in training mode, always the same weights."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SIZES, **FAMILIES[family], **changes})
    kinds = {"attn_implementation": attention, "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_config(config, **kinds).to(dtype).train()


def batch(
    rows: int = 3, length: int = 10, *, padding: str = "right", seed: int = 1
) -> dict[str, Tensor]:
    """Ids with ragged padding, labels with a masked prompt."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, SIZES["vocab_size"], (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, slice(length - 2 * row, None) if padding == "right" else slice(0, 2 * row)] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def written_out(
    model: nn.Module,
    given: dict[str, Tensor],
    documents: Tensor,
    *,
    k: int = 1,
    weight: float = 0.8,
    projector: dict[str, Tensor] | None = None,
    stop_gradient: bool = True,
) -> Tensor:
    """``mean CE over V_1 with labels + weight * mean (1 - cos(P(h_t), s_k[t+1])) over V_1`` of the
    model's outputs."""
    call = {name: value for name, value in given.items() if name != "labels"}
    out = model(**call, output_hidden_states=True, use_cache=False)
    labels = given["labels"]
    pair = (documents[:, 1:] == documents[:, :-1]) & (documents[:, :-1] >= 0)
    target = pair & (labels[:, 1:] != -100)
    loss = F.cross_entropy(out.logits[:, :-1][target], labels[:, 1:][target])
    if not weight:
        return loss
    h, s = out.hidden_states[-1], out.hidden_states[k]
    s = s.detach() if stop_gradient else s
    p = h if projector is None else project(h, projector)
    return (
        loss
        + weight * (1 - F.cosine_similarity(p[:, :-1], s[:, 1:], dim=-1, eps=1e-6))[pair].mean()
    )


def project(h: Tensor, projector: dict[str, Tensor]) -> Tensor:
    """``W_down (silu(W_gate h) * W_up h)``."""
    gate, up = projector["gate_up"].chunk(2)
    return F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), projector["down"])


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """``{name: gradient}`` of every parameter that has one."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_equal_training(
    model: Any, given: dict[str, Tensor], documents: Tensor, handle: Any, **options: Any
) -> None:
    """The attached model's loss and every gradient are those of the formula."""
    out = model(**given)
    assert out.logits is None
    found = gradients(out.loss, model)
    own = (
        dict(model.nitp_objective.terms["nitp"].named_parameters())
        if "nitp" in model.nitp_objective.terms
        else None
    )
    expected = written_out(model, given, documents, projector=own, **options)
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-9, atol=1e-10)
    reference = gradients(expected, model)
    assert found.keys() >= reference.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, reference.get(name, torch.zeros_like(value)), rtol=1e-7, atol=1e-9, msg=name
        )
