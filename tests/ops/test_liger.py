"""Liger-Kernel around attach: its forward before attach trains the objective, after it is refused
by name.

Its kernels need a GPU; its forward, which computes a fused loss of its own in training, does not.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

import nitp_ops
from tests.support.hugging_face_cases import batch, gradients, make
from tests.support.trainer_cases import padded, ragged_rows, tiny_llama, trainer_arguments

pytestmark = pytest.mark.trainers
SPEC = "ntp + 0.8*nitp(target_layer=1)"


def fused_forward(
    self: Any,
    input_ids: Any = None,
    labels: Any = None,
    logits_to_keep: Any = 0,
    skip_logits: Any = None,
    **rest: Any,
) -> Any:
    """As Liger's: in training with labels it asks its own loss, and neither the head nor
    model.loss_function."""
    shift_labels = rest.pop("shift_labels", None)
    rest.pop("return_dict", None)
    hidden = self.model(input_ids=input_ids, **rest).last_hidden_state
    kept = hidden[
        :, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    ]
    if self.training and labels is not None if skip_logits is None else skip_logits:
        raise RuntimeError("no GPU")
    logits = self.lm_head(kept)
    loss = None
    if labels is not None:
        loss = self.loss_function(
            logits=logits, labels=labels, shift_labels=shift_labels, vocab_size=logits.shape[-1]
        )
    return CausalLMOutputWithPast(loss=loss, logits=logits)


fused_forward.__module__ = "liger_kernel.transformers.model.llama"
_NOTHING_ELSE = {"rope": False, "rms_norm": False, "swiglu": False}


def imitation(model: Any = None) -> None:
    from transformers.models.llama import modeling_llama

    if model is None:
        modeling_llama.LlamaForCausalLM.forward = fused_forward  # type: ignore[reportAttributeAccessIssue]
    else:
        model.forward = MethodType(fused_forward, model)


def real(model: Any = None) -> None:
    from liger_kernel.transformers import apply_liger_kernel_to_llama  # type: ignore[reportMissingImports]

    apply_liger_kernel_to_llama(model=model, **_NOTHING_ELSE)


@pytest.fixture(params=[imitation, real], ids=lambda patch: patch.__name__)
def patch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(
        modeling_llama.LlamaForCausalLM, "forward", modeling_llama.LlamaForCausalLM.forward
    )
    return request.param


def reference() -> tuple[Tensor, dict[str, Tensor], float]:
    model = make("llama")
    nitp_ops.attach(model, SPEC)
    loss = model(**batch()).loss
    return loss.detach(), gradients(loss, model), model.eval()(**batch()).loss.item()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("of_class", [True, False], ids=["class", "instance"])
def test_liger_before_attach_trains_the_objective(patch: Any, of_class: bool, training: bool):
    expected, expected_gradients, plain = reference()
    if of_class:
        patch()
    model = make("llama")
    if not of_class:
        patch(model)
    handle = nitp_ops.attach(model.train(training), SPEC)
    loss = model.train()(**batch()).loss
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(loss, model), expected_gradients, rtol=1e-9, atol=1e-12)
    assert model.eval()(**batch()).loss.item() == pytest.approx(plain, rel=1e-6)
    handle.detach()
    assert ("forward" in model.__dict__) is not of_class


@pytest.mark.parametrize("of_class", [True, False], ids=["class", "instance"])
def test_liger_after_attach_is_refused_by_name_before_it_computes(patch: Any, of_class: bool):
    plain = reference()[2]
    model = make("llama")
    nitp_ops.attach(model, SPEC)
    patch(*([] if of_class else [model]))
    ran = []
    model.model.register_forward_hook(lambda *_: ran.append(1))
    expected = r"replaced by liger_kernel\..*expected attach .*\(Liger-Kernel: apply it before attach, or with f"
    with pytest.raises(ValueError, match=expected):
        model(**batch())
    assert not ran
    assert model.eval()(**batch()).loss.item() == pytest.approx(plain, rel=1e-6)


def test_accelerate_may_wrap_a_forward_that_liger_replaced_before_attach(patch: Any):
    model = make("llama")
    patch(model)
    nitp_ops.attach(model, SPEC)
    model.forward = MethodType(torch.autocast("cpu", enabled=False)(model.forward.__func__), model)
    torch.testing.assert_close(model(**batch()).loss.detach(), reference()[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("config", [None, {"fused_linear_cross_entropy": True}])
def test_the_trainer_refuses_use_liger_kernel_with_its_loss(tmp_path: Any, config: Any):
    from nitp_ops.trainers.transformers import ObjectiveTrainer

    arguments = trainer_arguments(tmp_path, use_liger_kernel=True, liger_kernel_config=config)
    with pytest.raises(
        ValueError,
        match=r"expected it with "
        r'liger_kernel_config=\{"fused_linear_cross_entropy": '
        r"False",
    ):
        ObjectiveTrainer(
            model=tiny_llama(), args=arguments, train_dataset=ragged_rows(), objective=SPEC
        )


def test_the_trainer_takes_the_other_kernels(tmp_path: Any):
    from nitp_ops.trainers.transformers import ObjectiveTrainer

    found = []
    for options in (
        {},
        {"liger_kernel_config": {"fused_linear_cross_entropy": False, **_NOTHING_ELSE}},
    ):
        arguments = trainer_arguments(
            tmp_path, max_steps=2, use_liger_kernel=bool(options), **options
        )
        trainer = ObjectiveTrainer(
            model=tiny_llama(),
            args=arguments,
            train_dataset=ragged_rows(),
            data_collator=padded,
            objective=SPEC,
        )
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert found[0] == found[1] and len(found[0]) == 2
