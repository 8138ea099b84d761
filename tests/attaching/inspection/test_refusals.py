"""What attach refuses, with the reason; and what it notices in training."""

from __future__ import annotations

import subprocess
import sys
from types import MethodType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from torch import Tensor, nn

import nitp_ops
from nitp_ops.attaching import handle_of
from nitp_ops.objectives import SpecError
from tests.support.hugging_face_cases import batch, make

pytestmark = pytest.mark.trainers


def test_importing_the_package_imports_no_trainer_and_attach_resolves_lazily():
    code = "import nitp_ops, sys; a = {'transformers', 'nitp_ops.attaching'} & set(sys.modules); nitp_ops.attach; "
    code += "assert not a and 'transformers' not in sys.modules and nitp_ops.attaching.attach is nitp_ops.attach"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("model", [3, nn.Linear(2, 2)], ids=["a number", "a linear"])
def test_what_is_no_hugging_face_model_is_refused(model: Any):
    with pytest.raises(
        TypeError,
        match=r"model is a \w+, expected a Hugging Face causal language "
        r"model",
    ):
        nitp_ops.attach(model, "ntp")


def test_a_second_attach_is_refused_and_a_handle_is_found_only_where_one_is():
    model = make("llama")
    with pytest.raises(ValueError, match="model is a LlamaForCausalLM without an objective"):
        handle_of(model)
    handle = nitp_ops.attach(model, "ntp")
    assert handle_of(model) is handle
    with pytest.raises(
        ValueError,
        match=r"has an objective already, expected handle\.detach\(\) "
        r"first",
    ):
        nitp_ops.attach(model, "ntp")


def test_a_spec_that_does_not_fit_leaves_the_model_as_it_was():
    model = make("llama")
    with pytest.raises(SpecError, match=r"target_layer is 3, expected an integer in \[0, 2\]"):
        nitp_ops.attach(model, "ntp + nitp(target_layer=3)")
    assert not hasattr(model, "nitp_objective") and "forward" not in model.__dict__


class Int8Linear(nn.Linear):
    """As quantised heads are: a linear with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.round())


def quantised(model: Any) -> None:
    model.lm_head = Int8Linear(32, 64, bias=False)


def integer_weight(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)


def replaced(model: Any) -> None:
    model.lm_head.forward = lambda hidden: hidden


def headless(model: Any) -> None:
    del model.lm_head


def adds_a_constant(model: Any) -> None:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = type(self).forward(self, *args, **kwargs)
        return type(out)(**{**out, "logits": out.logits + 1})

    model.forward = MethodType(forward, model)


def builds_every_logit(model: Any) -> None:
    def forward(
        self: Any, input_ids: Tensor, labels: Any = None, logits_to_keep: Any = 0, **kwargs: Any
    ) -> Any:
        return type(self).forward(self, input_ids, labels=labels, **kwargs)

    model.forward = MethodType(forward, model)


def normalises_twice(model: Any) -> None:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        head = model.lm_head
        hook = head.register_forward_pre_hook(
            lambda module, args: (nn.functional.rms_norm(args[0], (32,)),)
        )
        out = type(self).forward(self, *args, **kwargs)
        hook.remove()
        return out

    model.forward = MethodType(forward, model)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            quantised,
            r"head is a Int8Linear with a forward of its own, expected a plain linear \(quantised",
        ),
        (integer_weight, "head has a weight of torch.int8, expected a floating point dtype"),
        (replaced, "head is a Linear with a forward of its own"),
        (headless, "model has no output embeddings, expected a causal language model with a head"),
        (adds_a_constant, "logits are no scale and softcap of what its head returns"),
        (
            builds_every_logit,
            "forward builds logits without logits_to_keep, expected none for no rows",
        ),
        (normalises_twice, "head reads something else than its body returns, expected the same"),
    ],
)
def test_a_model_whose_head_is_not_what_it_seems_is_refused_by_reason(spoil: Any, message: str):
    model = make("llama")
    spoil(model)
    with pytest.raises(ValueError, match=message):
        nitp_ops.attach(model, "ntp")
    assert not hasattr(model, "nitp_objective")


def test_a_head_behind_a_transform_and_an_encoder_decoder_are_refused():
    from transformers import (
        BertConfig,
        BertLMHeadModel,
        RobertaConfig,
        RobertaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "vocab_size": 64,
    }
    sizes |= {"num_attention_heads": 2, "is_decoder": True}
    transforms = {
        "cls.predictions.transform.dense": BertLMHeadModel(BertConfig(**sizes)),
        "lm_head.dense": RobertaForCausalLM(RobertaConfig(**sizes)),
    }
    for name, model in transforms.items():
        expected = (
            rf"^attach: the {type(model).__name__}'s head reads what {name} makes of the body's "
            r"last hidden state"
        )
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            with pytest.raises(ValueError, match=expected):
                nitp_ops.attach(model.to(dtype), "ntp")
        assert not any(module._forward_pre_hooks for module in model.modules())
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=32, d_ff=48, num_layers=2, num_heads=2, d_kv=16, vocab_size=64)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration"):
        nitp_ops.attach(t5, "ntp")


def test_a_loss_that_the_model_computes_from_logits_is_refused():
    model = make("llama")

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = type(self).forward(self, *args, **kwargs)
        z_loss = out.logits.logsumexp(-1).square().mean()
        return out if out.loss is None else type(out)(**{**out, "loss": out.loss + 1e-3 * z_loss})

    forward.__signature__ = __import__("inspect").signature(type(model).forward)  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)
    with pytest.raises(ValueError, match="adds a loss of its logits to its loss, expected none"):
        nitp_ops.attach(model, "ntp")


def test_a_wrapped_model_is_refused():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        wrapped = nn.parallel.DistributedDataParallel(make("llama"))
        with pytest.raises(
            ValueError, match="is a DistributedDataParallel, expected attach before it is wrapped"
        ):
            nitp_ops.attach(wrapped, "ntp")
        sharded = make("llama")
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(
            ValueError,
            match=r"sharded \(FSDPLlamaForCausalLM\), expected attach "
            r"before fully_sh",
        ):
            nitp_ops.attach(sharded, "ntp")
    finally:
        dist.destroy_process_group()


def test_a_later_overwrite_of_forward_raises_at_the_first_step_and_wrapping_does_not():
    model, given = make("llama"), batch()
    nitp_ops.attach(model, "ntp")
    ours = model.forward
    model.forward = MethodType(torch.autocast("cpu", enabled=False)(ours.__func__), model)
    model(**given)
    model.forward = MethodType(type(model).forward, model)
    model.eval()(**given)
    with pytest.raises(
        RuntimeError,
        match=r"forward was replaced by LlamaForCausalLM\.forward, "
        r"expected attach",
    ):
        model.train()(**given)


def test_accelerate_may_wrap_the_forward_and_unwrap_it_again():
    import accelerate

    # a trainer in this process leaves it
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    model, given = make("llama", dtype=torch.float32), batch()
    nitp_ops.attach(model, "ntp + nitp")
    expected = model(**given).loss
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(model)
    torch.testing.assert_close(prepared(**given).loss, expected, rtol=0.05, atol=0.05)
    bare: Any = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(bare(**given).loss, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"attention_mask": torch.ones(3, 1, 10, 10)},
            r"attention_mask has shape \(3, 1, 10, "
            r"10\), expected \[B, T\]",
        ),
        ({"position_ids": torch.zeros(3, 9).long()}, r"position_ids has shape \(3, 9\), expected"),
        ({"labels": torch.zeros(3, 9).long()}, r"labels has shape \(3, 9\), expected \(3, 10\)"),
        (
            {"fused_lm_head": True},
            r"fused_lm_head is True, expected a trainer of "
            r"nitp_ops\.trainers\.trl",
        ),
    ],
    ids=["4-D mask", "positions", "labels", "fused head of TRL"],
)
def test_a_batch_that_does_not_fit_is_refused(change: dict[str, Any], message: str):
    model = make("llama")
    handle = nitp_ops.attach(model, "ntp")
    with pytest.raises((ValueError, RuntimeError), match=message):
        if "fused_lm_head" in change:
            model(**batch(), **change)
        else:
            handle.count(batch() | change)


def test_a_step_is_an_integer():
    handle = nitp_ops.attach(make("llama"), "ntp")
    for step in (-1, 2.0, True, "3"):
        with pytest.raises(ValueError, match=r"set_step: step is .*, expected an integer >= 0"):
            handle.set_step(step)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError,
        match=r"set_step: step is 9223372036854775808, expected an "
        r"integer of 64 bits >= 0",
    ):
        handle.set_step(2**63)
