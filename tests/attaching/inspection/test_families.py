"""attach on tiny models of many families: the formula in training, the plain model everywhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import nitp_ops
from nitp_ops.objectives import Streams
from tests.support.hugging_face_cases import (
    FAMILIES,
    assert_equal_training,
    batch,
    gradients,
    make,
    written_out,
)

pytestmark = pytest.mark.trainers
SPEC = "ntp + 0.8*nitp(target_layer=1)"


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def documents(given: dict[str, Any]) -> torch.Tensor:
    return given["attention_mask"].long() - 1


def test_loss_and_every_gradient_are_those_of_the_formula(family: str):
    model, given = make(family), batch()
    handle = nitp_ops.attach(model, SPEC)
    assert_equal_training(model, given, documents(given), handle)


def test_eval_and_generate_are_the_plain_model_bit_for_bit(family: str):
    model, given = make(family, dtype=torch.float32).eval(), batch()
    prompt = {"input_ids": given["input_ids"][:1], "max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        before, text = model(**given), model.generate(**prompt)
    nitp_ops.attach(model, SPEC)
    with torch.no_grad():
        after, again = model(**given), model.generate(**prompt)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
    assert torch.equal(text, again)


def test_the_head_alone_gives_the_logits_of_the_model(family: str):
    """The measured softcap and scale, on the model's own hidden states."""
    model, given = make(family).eval(), batch()
    handle = nitp_ops.attach(model, "ntp")
    info = handle.objective.info
    body = handle._tap.sites.trunk
    seen: list[Any] = []
    hook = body.register_forward_hook(
        lambda module, args, output: seen.append(output.last_hidden_state)
    )
    with torch.no_grad():
        logits = model(**given).logits
        hook.remove()
        own = info.logit_scale * model.get_output_embeddings()(seen[0])
    own = own if info.softcap is None else info.softcap * torch.tanh(own / info.softcap)
    torch.testing.assert_close(own, logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "softcap", "scale"),
    [("llama", None, 1.0), ("gemma2", 5.0, 1.0), ("gemma3_text", 4.0, 1.0), ("cohere", None, 0.25),
     ("granite", None, 0.25), ("minicpm3", None, 0.5), ("nanochat", 3.0, 1.0)],
)  # fmt: skip
def test_softcap_and_scale_are_those_of_the_config(
    family: str, softcap: float | None, scale: float
):
    info = nitp_ops.attach(make(family), "ntp").objective.info
    assert info.softcap == softcap and info.logit_scale == pytest.approx(scale, rel=1e-6)
    assert (info.vocab_size, info.num_layers) == (64, 3)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_balance_loss_that_the_model_adds_stays(family: str):
    model, given = make(family, output_router_logits=True, router_aux_loss_coef=0.3), batch()
    plain = model(**given)
    extra = plain.loss - written_out(model, given, documents(given), weight=0.0)
    assert extra > 0.01
    nitp_ops.attach(model, "ntp")
    out = model(**given)
    torch.testing.assert_close(out.loss.double(), plain.loss.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.aux_loss, plain.aux_loss)
    reference = gradients(model.eval()(**given).loss, model)
    for name, value in gradients(model.train()(**given).loss, model).items():
        torch.testing.assert_close(value, reference[name], rtol=1e-5, atol=1e-6)


def test_a_balance_loss_becomes_a_term_of_the_spec_and_is_not_counted_twice():
    model, given = make("mixtral", router_aux_loss_coef=0.3), batch()
    handle = nitp_ops.attach(model, "ntp + balance: 0.5*external(stream=aux_loss)")
    out = model(**given)
    plain = written_out(model, given, documents(given), weight=0.0)
    torch.testing.assert_close(out.loss.double(), plain + 0.5 * out.aux_loss.double())
    assert handle.metrics.compute()["loss/balance"] == pytest.approx(0.5 * out.aux_loss.item())


def test_the_transform_is_measured_on_the_meta_device_too():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    with torch.device("meta"):
        model = Gemma2ForCausalLM(Gemma2Config())
    handle = nitp_ops.attach(model, "ntp + nitp")
    assert (handle.objective.info.softcap, handle.objective.info.vocab_size) == (30.0, 256000)
    assert all(parameter.is_meta for parameter in handle.objective.parameters())


def test_an_ablation_that_sends_a_gradient_into_the_target_does():
    model, given = make("llama"), batch()
    handle = nitp_ops.attach(model, "ntp + 0.8*nitp(target_layer=1, stop_gradient=False)")
    assert_equal_training(model, given, documents(given), handle, stop_gradient=False)


def test_every_stream_that_an_objective_may_require_is_there():
    model, given = make("llama"), batch()
    spec = "ntp + nitp(source=last_residual) + mtp_sequential(source=last_residual) + nextlat + z: nitp(target_layer=0)"
    handle = nitp_ops.attach(model, spec)
    loss = model(**given).loss
    out = model(**{k: v for k, v in given.items() if k != "labels"}, output_hidden_states=True)
    residual = []
    hook = model.model.norm.register_forward_pre_hook(lambda module, args: residual.append(args[0]))
    model(**{k: v for k, v in given.items() if k != "labels"})
    hook.remove()
    streams = Streams(
        token_ids=given["input_ids"], labels=given["labels"], attention_mask=given["attention_mask"],
        last_hidden=out.hidden_states[-1], last_residual=residual[0], hidden_states=dict(enumerate(out.hidden_states)),
        head=model.lm_head, embed=model.model.embed_tokens,
    )  # fmt: skip
    torch.testing.assert_close(loss, handle.objective(streams).loss, rtol=0, atol=0)
