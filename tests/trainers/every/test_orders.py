"""In which order a model is adapted, attached and compiled: the right one trains, the wrong one
says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nitp_ops
from tests.support.trainer_cases import (
    SPEC,
    ByHand,
    padded,
    ragged_rows,
    tiny_llama,
    trainer_arguments,
)

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import Trainer

from nitp_ops.trainers.transformers import ObjectiveTrainer

pytestmark = pytest.mark.trainers
RATE = 0.5


def make_trainer(
    folder, model, cls: Any = ObjectiveTrainer, objective: str | None = SPEC, **options
) -> Any:
    given = {} if objective is None else {"objective": objective}
    arguments = trainer_arguments(folder, **options)
    return cls(
        model=model, args=arguments, train_dataset=ragged_rows(), data_collator=padded, **given
    )


def lora(model, **options) -> Any:
    import peft

    chosen: Any = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "r": 2, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**chosen))


def test_peft_then_attach_trains_the_adapter_and_the_projector_and_nothing_else(tmp_path):
    model = lora(tiny_llama())
    trainer = make_trainer(tmp_path, model)
    by_hand = ByHand(tiny_llama(), trainer.nitp.objective)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    adapters = {name for name in before if "lora_" in name}
    own = {name for name in before if "nitp_objective" in name}
    assert changed == adapters | own and own
    # an adapter starts as zero, so that the first loss is the plain model's
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["loss"] == pytest.approx(by_hand.loss([padded(ragged_rows())]).item(), rel=1e-6)


def test_attach_then_peft_is_refused_at_the_first_step(tmp_path):
    model = tiny_llama()
    nitp_ops.attach(model, SPEC)
    with pytest.raises(ValueError, match="attach after it"):
        make_trainer(tmp_path, lora(model), Trainer, objective=None).train()


def test_an_adapter_on_the_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match="adapter"):
        make_trainer(tmp_path, lora(tiny_llama(), target_modules=["lm_head"]))


def test_a_resumed_adapter_brings_its_projector(tmp_path):
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "epoch"}
    straight = make_trainer(tmp_path, lora(tiny_llama()), **options)
    straight.train()
    torch.manual_seed(1)
    resumed = make_trainer(tmp_path, lora(tiny_llama()), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    expected = dict(straight.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        torch.testing.assert_close(
            parameter, expected[name], rtol=0, atol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_attach_then_the_trainers_compile_takes_the_steps_of_the_formula(tmp_path):
    # the backend without a code generator: what is proven is that tracing keeps the objective
    trainer = make_trainer(
        tmp_path, tiny_llama(), torch_compile=True, torch_compile_backend="eager"
    )
    by_hand = ByHand(tiny_llama(), trainer.nitp.objective)
    trainer.train()
    for _ in range(2):
        by_hand.step(by_hand.loss([padded(ragged_rows())]), RATE)
    by_hand.check(trainer.model)


def test_compile_then_attach_is_refused(tmp_path):
    with pytest.raises(ValueError, match="attach before compile"):
        make_trainer(tmp_path, torch.compile(tiny_llama(), backend="eager"))


def test_a_second_objective_is_refused(tmp_path):
    model = tiny_llama()
    nitp_ops.attach(model, SPEC)
    with pytest.raises(ValueError, match="already"):
        make_trainer(tmp_path, model)
