"""Copies of an attached model that leave the process: pickle, torch.save, mp.spawn give one that
trains alike."""

from __future__ import annotations

import inspect
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import spawn

pytest.importorskip("transformers")

import nitp_ops
from nitp_ops.attaching import handle_of
from tests.support.hugging_face_cases import batch, gradients, make

pytestmark = pytest.mark.trainers
SPEC = "ntp + schedule(to=0.8, begin=0, warmup=2)*nitp(target_layer=1) + 0.3*mtp_sequential + top(window=4)"


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [pickled, saved], ids=lambda copied: copied.__name__)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "peft"])
def test_a_pickled_model_trains_alike_and_on_its_own(copied: Callable[[Any], Any], adapted: bool):
    model = make("llama", tie_word_embeddings=not adapted)
    if adapted:
        import peft

        config = peft.LoraConfig(
            target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, config)
    handle = nitp_ops.attach(model, SPEC)
    handle.set_step(1)
    given = batch()
    expected = model(**given).loss
    reference = gradients(expected, model)
    twin = copied(model)
    other = handle_of(twin)
    assert other is not handle and other.objective is not handle.objective
    found = gradients((loss := twin(**given).loss), twin)
    assert torch.equal(loss, expected) and found.keys() == reference.keys()
    assert all(torch.equal(found[name], value) for name, value in reference.items())
    assert set(twin.state_dict()) == set(model.state_dict())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    assert torch.equal(model(**given).loss, expected) and not torch.equal(
        twin(**given).loss, expected
    )
    other.detach()
    plain = twin.get_base_model() if adapted else twin
    assert "forward" not in plain.__dict__ and torch.isfinite(twin(**given).loss)
    assert torch.equal(model(**given).loss, expected)


def test_a_pickled_forward_keeps_its_signature():
    model = make("llama")
    nitp_ops.attach(model, "ntp")
    names = list(inspect.signature(make("llama").forward).parameters)
    assert list(inspect.signature(pickled(model).forward).parameters) == names
    assert list(inspect.signature(model.forward.__func__).parameters) == ["self", *names]


def _train(rank: int, model: Any, file: str) -> None:
    loss = model(**batch()).loss
    torch.save((loss.detach(), gradients(loss, model)), file)


@pytest.mark.ranks
def test_a_spawned_process_trains_the_model_that_it_is_given(tmp_path: Path):
    model = make("llama")
    handle = nitp_ops.attach(model, SPEC)
    handle.set_step(1)
    model = model.share_memory()
    spawn(_train, args=(model, str(tmp_path / "found.pt")), nprocs=1)
    loss, found = torch.load(tmp_path / "found.pt")
    expected = model(**batch()).loss
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found, gradients(expected, model), rtol=1e-9, atol=1e-12)
