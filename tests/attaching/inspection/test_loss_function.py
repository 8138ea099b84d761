"""A ``model.loss_function`` that was replaced before attach: served where it is the cross-entropy
of next tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

import transformers
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

import nitp_ops
from tests.support.hugging_face_cases import SIZES, batch, make

pytestmark = pytest.mark.trainers


def test_a_loss_of_unshifted_labels_is_refused():
    model = make("llama")
    model.loss_function = ForMaskedLMLoss
    with pytest.raises(
        ValueError,
        match="loss_function counts the label of the first token, expected a loss of next",
    ):
        nitp_ops.attach(model, "ntp")
    assert model.loss_function is ForMaskedLMLoss


def smoothed(logits: Any, labels: Any, vocab_size: int, **kwargs: Any) -> Any:
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), label_smoothing=0.1)


def with_z_loss(logits: Any, labels: Any, vocab_size: int, **kwargs: Any) -> Any:
    z = logits.logsumexp(-1).square().mean()
    return ForCausalLMLoss(logits, labels, vocab_size=vocab_size, **kwargs) + 1e-3 * z


def constant(logits: Any, labels: Any, vocab_size: int, **kwargs: Any) -> Any:
    return logits.sum() * 0 + 7


@pytest.mark.parametrize("loss", [smoothed, with_z_loss, constant], ids=lambda loss: loss.__name__)
def test_another_loss_than_that_of_next_tokens_is_refused_and_not_dropped(loss: Any):
    model = make("llama")
    model.loss_function = loss
    expected = rf"^attach: the LlamaForCausalLM's loss_function, \S+\.{loss.__name__}, gives [\d.]+ where the cross"
    with pytest.raises(ValueError, match=expected):
        nitp_ops.attach(model, "ntp")
    assert model.loss_function is loss and not hasattr(model, "nitp_objective")


def test_a_loss_that_wants_more_than_logits_and_labels_is_refused_by_its_error():
    model = make("llama")

    def against_a_teacher(logits: Any, labels: Any, vocab_size: int, *, teacher: Any) -> Any:
        return F.mse_loss(logits, teacher)

    model.loss_function = against_a_teacher
    with pytest.raises(
        ValueError,
        match=r"replaced by \S+against_a_teacher, which fails on "
        r".*TypeError: .*teacher",
    ):
        nitp_ops.attach(model, "ntp")


@pytest.mark.parametrize("kind", ["transformers", "nitp_ops"])
def test_another_implementation_of_the_same_loss_is_served(kind: str):
    model, given = make("llama", dtype=torch.float32), batch()
    model.loss_function = (
        ForCausalLMLoss if kind == "transformers" else nitp_ops.layers.ForCausalLMLoss().forward
    )
    plain = model(**given).loss
    nitp_ops.attach(model, "ntp")
    torch.testing.assert_close(model(**given).loss, plain, check_dtype=False, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_metrics_of_a_batch_without_labels_add_up_to_its_share_of_the_window(family: str):
    model, given = make(family), batch()
    handle = nitp_ops.attach(model, "ntp + 0.8*nitp(target_layer=1)")
    none = given | {"labels": torch.full_like(given["labels"], -100)}
    losses, metrics = [], []
    for each in (none, given):
        losses.append(
            model(**each, num_items_in_batch=(given["labels"][:, 1:] != -100).sum()).loss.item()
        )
        assert handle.metrics is not None
        metrics.append(handle.metrics)
    assert losses[0] == metrics[0].compute()["loss"] == metrics[0].compute()["loss/nitp"] == 0
    assert losses[1] == pytest.approx(metrics[1].compute()["loss"])
    assert sum(losses) == pytest.approx((metrics[0] + metrics[1]).compute()["loss"])


def test_a_loss_that_gets_other_logits_than_those_of_the_call_is_refused_by_name():
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    model = transformers.GitForCausalLM(transformers.GitConfig(**SIZES, vision_config=vision))
    with pytest.raises(
        ValueError,
        match=r"the GitForCausalLM's loss gets logits .* expected "
        r"those of the call",
    ):
        nitp_ops.attach(model, "ntp")


def test_an_encoder_decoder_is_refused_whose_labels_are_those_of_its_own_position():
    sizes: dict[str, Any] = {
        "d_model": 32,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 2,
        "d_kv": 16,
        "vocab_size": 64,
    }
    with pytest.raises(
        ValueError, match="T5ForConditionalGeneration, an encoder-decoder whose labels are those of"
    ):
        nitp_ops.attach(
            transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)), "ntp"
        )
