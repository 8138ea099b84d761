"""attach on a tiny Llama: windows, documents, checkpointing, compile, copies, checkpoints, and
leaving no trace."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from torch import Tensor, nn

import nitp_ops
from nitp_ops.attaching import handle_of
from tests.support.hugging_face_cases import (
    assert_equal_training,
    batch,
    gradients,
    make,
    written_out,
)

pytestmark = pytest.mark.trainers
SPEC = "ntp + 0.8*nitp(target_layer=1)"


def attached(spec: str = SPEC, **changes: Any) -> tuple[Any, Any]:
    model = make("llama", **changes)
    return model, nitp_ops.attach(model, spec)


def padding(given: dict[str, Tensor]) -> Tensor:
    return given["attention_mask"] - 1


def test_left_padding_and_a_batch_without_a_mask():
    # eager attention makes NaN of a row that sees nothing
    model, handle = attached(attention="sdpa")
    left = batch(padding="left")
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert_equal_training(model, left, padding(left), handle)
    whole = {name: value for name, value in batch(rows=1).items() if name != "attention_mask"}
    assert_equal_training(model, whole, torch.zeros_like(whole["input_ids"]), handle)


def test_documents_of_a_packed_row_derive_from_position_ids_and_from_cu_seqlens():
    model, handle = attached()
    ids = batch(rows=1)["input_ids"]
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2, 2]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]])
    given = {"input_ids": ids, "labels": ids, "position_ids": positions}
    assert_equal_training(model, given, documents, handle)
    lengths = torch.tensor([0, 4, 7, 10], dtype=torch.int32)
    by_lengths = model(
        **given, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, max_length_q=4, max_length_k=4
    ).loss
    assert torch.equal(by_lengths, model(**given).loss)


def test_shift_labels_come_before_labels():
    model, _ = attached("ntp")
    given = batch()
    shifted = torch.nn.functional.pad(given["labels"], (0, 1), value=-100)[:, 1:]
    expected = model(**given).loss
    found = model(**(given | {"labels": torch.zeros_like(shifted)}), shift_labels=shifted).loss
    torch.testing.assert_close(found, expected)
    assert torch.equal(
        model(**{k: v for k, v in given.items() if k != "labels"}, shift_labels=shifted).loss, found
    )


def test_counts_of_the_window_make_microbatches_add_up_to_the_batch():
    model, handle = attached()
    given = batch(rows=4)
    whole = model(**given)
    reference = gradients(whole.loss, model)
    parts = [
        {name: value[rows] for name, value in given.items()} for rows in (slice(0, 1), slice(1, 4))
    ]
    handle.set_counts(handle.count(parts[0]) + handle.count(parts[1]))
    model.zero_grad()
    # ignored: the counts are known
    losses = [model(**part, num_items_in_batch=7).loss for part in parts]
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(torch.stack(losses).sum(), whole.loss, rtol=1e-12, atol=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, reference[name], rtol=1e-9, atol=1e-11)
    handle.set_counts(None)
    assert torch.equal(model(**given).loss, whole.loss)


def test_num_items_in_batch_weights_local_means_by_the_share_of_labels():
    model, _ = attached()
    given = batch(rows=4)
    items = (given["labels"][:, 1:] != -100).sum()
    total = torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, 1), slice(1, 4)):
        part = {name: value[rows] for name, value in given.items()}
        local = model(**part).loss
        share = (part["labels"][:, 1:] != -100).sum() / items
        torch.testing.assert_close(model(**part, num_items_in_batch=items).loss, local * share)
        total += local * share
    alone = model(**given, num_items_in_batch=int(items)).loss
    torch.testing.assert_close(alone, model(**given).loss)
    empty = {name: value[:1] for name, value in given.items()} | {
        "labels": torch.full((1, 10), -100)
    }
    assert model(**empty, num_items_in_batch=items).loss == 0


def test_a_batch_without_a_target_gives_zero_and_no_nan():
    model, _ = attached("ntp")
    given = batch()
    loss = model(**(given | {"labels": torch.full_like(given["labels"], -100)})).loss
    loss.backward()
    assert loss == 0 and all(
        torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None
    )


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, stop_gradient: bool):
    spec = f"ntp + 0.8*nitp(target_layer=1, stop_gradient={stop_gradient})"
    model, _ = attached(spec)
    given = batch()
    reference = gradients(model(**given).loss, model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(model(**given).loss, model)
    hook.remove()
    assert len(calls) == 2, "the first block is not run again"
    assert found.keys() == reference.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, reference[name], rtol=1e-10, atol=1e-12)


def test_tied_embeddings_get_the_gradients_of_both_uses():
    model, handle = attached(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    given = batch()
    assert_equal_training(model, given, padding(given), handle)


def test_without_labels_and_in_eval_the_model_is_plain_also_in_training_mode():
    model, handle = attached(dtype=torch.float32)
    plain = make("llama", dtype=torch.float32)
    given = batch()
    free = {name: value for name, value in given.items() if name != "labels"}
    assert torch.equal(model(**free).logits, plain(**free).logits)
    assert handle.metrics is None
    assert torch.equal(model.eval()(**given).loss, plain.eval()(**given).loss)
    first, second = (m(**given, return_dict=False) for m in (model, plain))
    assert len(first) == len(second) and torch.equal(first[1], second[1])


def test_a_tuple_is_returned_where_a_tuple_is_asked_for_and_arguments_may_be_positional():
    model, _ = attached()
    given = batch()
    loss = model(given["input_ids"], given["attention_mask"], labels=given["labels"]).loss
    assert torch.equal(model(**given, return_dict=False)[0], loss)


def test_the_signature_is_that_of_the_plain_model():
    model, _ = attached()
    assert list(inspect.signature(model.forward).parameters) == list(
        inspect.signature(make("llama").forward).parameters
    )
    assert model.forward.__name__ == "forward"


def test_no_logits_and_no_other_hidden_state_are_kept(monkeypatch: pytest.MonkeyPatch):
    model, handle = attached()
    calls = []

    def of_engine(module: nn.Module, args: Any, output: Tensor) -> None:
        calls.append(output.numel())

    of_engine.__module__ = "torch.distributed.fsdp"
    model.lm_head.register_forward_hook(of_engine)
    out = model(**batch())
    assert calls == [1], (
        "an engine's hooks on the head run once, around the objective's own reading of it"
    )
    assert (
        out.logits is None
        and out.hidden_states is None
        and "_call_impl" not in model.lm_head.__dict__
    )
    assert handle._tap._found == {}


def test_a_scheduled_weight_follows_set_step():
    model, handle = attached("ntp + schedule(to=1.0, begin=0, warmup=10)*nitp(target_layer=1)")
    given = batch()
    with pytest.raises(
        ValueError,
        match=r"step is None, expected an integer \(scheduled weights: "
        r"nitp\)",
    ):
        model(**given)
    handle.set_step(5)
    model(**given)
    numbers = handle.metrics.compute()
    assert numbers["loss/nitp"] == pytest.approx(0.5 * numbers["nitp/loss"])


def test_a_deep_copy_is_an_attached_model_of_its_own():
    model, handle = attached()
    twin = copy.deepcopy(model)
    given = batch()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    other = handle_of(twin)
    assert other is not handle
    assert_equal_training(twin, given, padding(given), other)
    other.detach()
    assert not hasattr(twin, "nitp_objective") and hasattr(model, "nitp_objective")
    assert_equal_training(model, given, padding(given), handle)


def test_detach_leaves_no_trace():
    model = make("llama", dtype=torch.float32)
    before, state = set(model.__dict__), set(model.state_dict())
    hooks = {
        name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()
    }
    given = batch()
    loss = model(**given).loss
    handle = nitp_ops.attach(model, SPEC)
    model(**given).loss.backward()
    handle.detach()
    assert set(model.__dict__) == before and set(model.state_dict()) == state
    assert {
        n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()
    } == hooks
    assert not model._state_dict_hooks and not model._load_state_dict_post_hooks
    assert model.forward.__func__ is type(model).forward and torch.equal(model(**given).loss, loss)
    with pytest.raises(ValueError, match="detached already"):
        handle.detach()
    nitp_ops.attach(model, "ntp")


def test_detach_under_somebody_elses_wrapper_gives_the_plain_model():
    model, handle = attached(dtype=torch.float32)
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    given = batch()
    model(**given).loss.backward()  # wrapping is allowed
    handle.detach()
    plain = make("llama", dtype=torch.float32)
    assert torch.equal(model(**given).loss, plain(**given).loss)


def test_the_formula_itself_can_fail():
    model, _ = attached()
    given = batch()
    expected = written_out(model, given, torch.zeros_like(given["input_ids"]), weight=0.0)
    assert abs(model(**given).loss - expected) > 0.1


def test_attach_draws_no_random_numbers_of_training():
    model = make("gpt2", embd_pdrop=0.5, initializer_range=0.3)
    given = batch()
    torch.manual_seed(7)
    plain = model(**given).loss
    torch.manual_seed(7)
    nitp_ops.attach(model, "ntp")
    torch.testing.assert_close(model(**given).loss, plain, check_dtype=False, rtol=1e-6, atol=1e-6)
