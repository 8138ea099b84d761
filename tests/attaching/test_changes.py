"""A model that changes after attach: what still trains, and what the first step refuses before it
computes anything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from torch import nn

import nitp_ops
from tests.support.hugging_face_cases import batch, gradients, make

pytestmark = pytest.mark.trainers
SPEC = "ntp + 0.8*nitp(target_layer=2)"


def resized(model: Any) -> None:
    model.resize_token_embeddings(70, mean_resizing=False)


def shrunk(model: Any) -> None:
    model.resize_token_embeddings(50, mean_resizing=False)


def biased(model: Any) -> None:
    model.set_output_embeddings(nn.Linear(32, 64, dtype=torch.float64))


def another_kind_of_head(model: Any) -> None:
    model.set_output_embeddings(nn.Identity())


def adapted_head(model: Any) -> None:
    import peft

    peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    )
    for parameter in model.nitp_objective.parameters():
        parameter.requires_grad_(True)


def without_the_last_blocks(model: Any) -> None:
    model.model.layers = model.model.layers[:2]


def without_the_first_block(model: Any) -> None:  # hidden_states[2] would pass, one block too early
    model.model.layers = model.model.layers[1:]
    model.config.num_hidden_layers -= 1


def one_block_more(model: Any) -> None:
    model.model.layers.insert(0, copy.deepcopy(model.model.layers[0]))
    model.config.num_hidden_layers += 1


def another_block(model: Any) -> None:
    model.model.layers[2] = copy.deepcopy(model.model.layers[2])


def another_body(model: Any) -> None:
    model.model = copy.deepcopy(model.model)


CHANGES: dict[Callable[[Any], None], str] = {
    resized: r"head was resized to 70 x 32, it was 64 x 32 at attach, expected attach after "
    r"resizing \(handle\.detach",
    shrunk: r"head was resized to 50 x 32, it was 64 x 32 at attach, expected attach after "
    r"resizing \(handle\.detach",
    biased: "head has a bias, it was 64 x 32 at attach, expected attach after that change",
    another_kind_of_head: "head is a Identity, it was 64 x 32 at attach",
    adapted_head: r"head is a Linear with submodules base_layer, .*, expected a plain linear \(an "
    r"adapter is more\)",
    without_the_last_blocks: "a LlamaDecoderLayer that streams pass is no part of the model any "
    "more, expected attach",
    without_the_first_block: "a LlamaDecoderLayer that streams pass is no part of the model any "
    "more, expected attach",
    one_block_more: "the model has 4 blocks, at attach it had 3, expected attach after that change",
    another_block: "a LlamaDecoderLayer that streams pass is no part of the model any more, "
    "expected attach",
    another_body: "a LlamaDecoderLayer that streams pass is no part of the model any more, "
    "expected attach",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_that_the_objective_would_misread_is_refused_before_anything_is_computed(
    change: Any,
):
    model = make("llama")
    handle = nitp_ops.attach(model, SPEC)
    change(model)
    ran = []
    model.model.embed_tokens.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match=CHANGES[change]):
        model(**batch())
    assert not ran
    handle.detach()
    assert not hasattr(model, "nitp_objective")


def test_attach_after_resizing_trains_with_the_new_size():
    model = make("llama")
    nitp_ops.attach(model, SPEC).detach()
    resized(model)
    nitp_ops.attach(model, "ntp")
    given = batch()
    assert model(**given).loss.item() == pytest.approx(model.eval()(**given).loss.item(), rel=1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_another_head_of_the_same_size_a_cast_and_tying_again_go_on_training(tied: bool):
    model = make("llama", tie_word_embeddings=tied)
    nitp_ops.attach(model, "ntp")
    given = batch()
    if not tied:
        model.set_output_embeddings(nn.Linear(32, 64, bias=False, dtype=torch.float64))
    model.tie_weights()
    assert model(**given).loss.item() == pytest.approx(model.eval()(**given).loss.item(), rel=1e-6)
    model.train().bfloat16()
    found = gradients(model(**given).loss, model)
    assert found["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


def emptied(model: Any, values: dict[str, Any]) -> None:
    model.to_empty(device="cpu")
    model.load_state_dict(values)


def assigned(model: Any, values: dict[str, Any]) -> None:
    model.load_state_dict(values, assign=True)


def refilled(load: Callable[[Any, dict[str, Any]], None], *, tied: bool) -> tuple[Any, Any, Any]:
    """(model that was attached on the meta device, the same one that never was there, handle of the
    first)."""
    plain = make("llama", tie_word_embeddings=tied)
    nitp_ops.attach(plain, SPEC)
    model = copy.deepcopy(make("llama", tie_word_embeddings=tied)).to("meta")
    model.tie_weights()
    handle = nitp_ops.attach(model, SPEC)
    load(model, copy.deepcopy(plain.state_dict()))
    # no state dict holds its buffers
    model.model.rotary_emb = copy.deepcopy(plain.model.rotary_emb)
    return model, plain, handle


@pytest.mark.parametrize("load", [emptied, assigned], ids=lambda load: load.__name__)
def test_a_tie_that_came_apart_is_refused_and_training_goes_on_once_it_is_tied_again(load: Any):
    """verl#7834: the first loss is right, then the halves drift apart."""
    model, plain, _ = refilled(load, tied=True)
    given = batch()
    with pytest.raises(
        ValueError,
        match=r"model\.embed_tokens\.weight and lm_head\.weight were one parameter at "
        r"attach and are two",
    ):
        model(**given)
    model.tie_weights()
    for _ in range(2):
        losses = []
        for each in (model, plain):
            loss = each(**given).loss
            loss.backward()
            losses.append(loss.item())
            torch.optim.SGD(each.parameters(), lr=0.5).step()
            each.zero_grad()
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def another_embedding(model: Any) -> None:
    model.set_input_embeddings(nn.Embedding(64, 32, dtype=torch.float64))


def another_head(model: Any) -> None:
    model.set_output_embeddings(nn.Linear(32, 64, bias=False, dtype=torch.float64))


@pytest.mark.parametrize(
    "change", [another_embedding, another_head], ids=lambda change: change.__name__
)
def test_a_new_module_at_one_end_of_a_tie_is_refused_until_it_is_tied_again(change: Any):
    model, given = make("llama", tie_word_embeddings=True), batch()
    nitp_ops.attach(model, "ntp")
    change(model)
    with pytest.raises(ValueError, match="were one parameter at attach and are two, expected one"):
        model(**given)
    model.tie_weights()
    assert model(**given).loss.item() == pytest.approx(model.eval()(**given).loss.item(), rel=1e-6)


@pytest.mark.parametrize("load", [emptied, assigned], ids=lambda load: load.__name__)
def test_own_parameters_have_their_seeded_values_once_a_model_from_the_meta_device_is_filled(
    load: Any,
):
    model, plain, handle = refilled(load, tied=False)
    for name, parameter in plain.nitp_objective.named_parameters():
        assert torch.equal(handle.objective.get_parameter(name), parameter), name
    given = batch()
    assert torch.equal(model(**given).loss, plain(**given).loss)


def test_own_parameters_that_were_trained_come_back_from_the_meta_device():
    model = make("llama")
    handle = nitp_ops.attach(model, "ntp + 0.8*nitp + 0.3*mtp_sequential")
    with torch.no_grad():
        for parameter in handle.objective.parameters():
            parameter.add_(1)
    before = {name: parameter.clone() for name, parameter in handle.objective.named_parameters()}
    values = model.state_dict()
    model.to("meta").load_state_dict(values, assign=True)
    assert before and all(
        torch.equal(handle.objective.get_parameter(name), value) for name, value in before.items()
    )


def test_own_parameters_that_stay_on_the_meta_device_are_refused(tmp_path: Path):
    model = make("llama")
    handle = nitp_ops.attach(model, SPEC)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    handle.objective.to("meta")
    expected = r"nitp_objective\.terms\.nitp\.gate_up is on the meta device, expected values: .*materialize\(device\)"
    with pytest.raises(ValueError, match=expected):
        handle.check(optimizer)
    with pytest.raises(ValueError, match=expected):
        model(**batch())
    with pytest.raises(
        ValueError,
        match=r"^save: .*gate_up is on the meta device, expected "
        r"values",
    ):
        handle.save(tmp_path)
    handle.objective.materialize(torch.device("cpu"))
    handle.save(tmp_path)
    handle.objective.to("meta")
    with pytest.raises(
        ValueError,
        match=r"^load: .*gate_up is on the meta device, expected "
        r"values",
    ):
        handle.load(tmp_path)  # copying into the meta device would do nothing
    handle.objective.materialize(torch.device("cpu"))
    model(**batch()).loss.backward()


def test_a_replaced_loss_is_refused_and_not_added_to_the_objective():
    model = make("llama")
    nitp_ops.attach(model, SPEC)
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum() * 0 + 7
    refusal = r"^attach: model\.loss_function was replaced by .*lambda.*, expected attach after"
    with pytest.raises(ValueError, match=refusal):
        model.train()(**batch())
