"""What docs/trainers.md and docs/distributed.md say beside what the other tests of the trainers
prove."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

import nitp_ops
from nitp_ops.attaching import handle_of
from nitp_ops.trainers.lightning import SIDECAR, ObjectiveCallback
from tests.support.hugging_face_cases import batch, gradients, make
from tests.trainers.cases.lightning import SPEC, Wrapped, fit, llama, rows

pytestmark = [pytest.mark.trainers, pytest.mark.filterwarnings("ignore")]


def test_weights_alone_of_lightning_hold_nothing_of_the_objective(tmp_path):
    trainer = fit(Wrapped(llama()), rows(), ObjectiveCallback(SPEC))
    for weights_only in (True, False):
        trainer.save_checkpoint(tmp_path / "saved.ckpt", weights_only=weights_only)
        saved = torch.load(tmp_path / "saved.ckpt", weights_only=False)
        assert (SIDECAR in saved) is not weights_only
        assert saved["state_dict"].keys() == Wrapped(llama()).state_dict().keys()


class FromIterator(Wrapped):
    def training_step(self, dataloader_iter: Any) -> Any:
        return self.model(**next(dataloader_iter)[0]).loss


def test_lightnings_other_ways_to_accumulate_are_refused(monkeypatch):
    with pytest.raises(
        TypeError,
        match=r"training_step takes dataloader_iter, expected batch \(a "
        r"window",
    ):
        fit(FromIterator(llama()), rows(), ObjectiveCallback(SPEC), accumulate_grad_batches=2)
    from lightning.pytorch.strategies import SingleDeviceStrategy

    monkeypatch.setattr(SingleDeviceStrategy, "handles_gradient_accumulation", True)
    with pytest.raises(
        ValueError, match="accumulates by itself, expected accumulate_grad_batches=1"
    ):
        fit(Wrapped(llama()), rows(), ObjectiveCallback(SPEC), accumulate_grad_batches=2)


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    import transformers

    from tests.trainers.test_transformers import make_trainer

    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    with pytest.raises(
        ValueError,
        match=r"ObjectiveTrainer: 2 GPUs in one process, expected one a "
        r"process \(torchrun\)",
    ):
        make_trainer(tmp_path)


def test_prompts_that_trl_masks_are_pairs_of_nitp_and_no_targets_of_ntp(tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset

    from tests.trainers.test_trl import make_trainer

    ids = [5, 6, 7, 8, 9, 10, 11, 12]
    data = Dataset.from_list([{"input_ids": ids, "completion_mask": [0] * 5 + [1] * 3}] * 8)
    for mask, pairs in (("document", 8 * 7), ("document+label", 8 * 3)):
        spec = f'ntp + 0.8*nitp(target_layer=1, mask="{mask}")'
        trainer = make_trainer(
            tmp_path, given={"train_dataset": data, "objective": spec}, completion_only_loss=True
        )
        trainer.train()
        (entry, *_) = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert (entry["ntp/count"], entry["nitp/count"]) == (8 * 3, pairs)


def test_a_handle_is_found_through_peft():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        make("llama"), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    handle = nitp_ops.attach(model, "ntp")
    assert handle_of(model) is handle


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_ddp_accumulates_without_sync_and_finds_the_parameters_of_a_term_of_weight_zero(group):
    model, plain = make("llama"), make("llama")
    spec = "ntp + schedule(to=1, begin=2)*nitp(target_layer=1)"
    handle = nitp_ops.attach(model, spec)
    other = nitp_ops.attach(plain, spec)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    assert handle_of(wrapped) is handle
    parts = [batch(seed=1), batch(seed=2)]
    for step in (0, 3):
        for each, of in ((handle, model), (other, plain)):
            each.set_step(step)
            each.set_counts(each.count(parts[0]) + each.count(parts[1]))
            of.zero_grad(set_to_none=True)
        with wrapped.no_sync():
            wrapped(**parts[0]).loss.backward()
        wrapped(**parts[1]).loss.backward()
        expected = gradients(sum(plain(**part).loss for part in parts), plain)  # type: ignore[arg-type]
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(
                parameter.grad, expected[name], rtol=1e-12, atol=1e-14, msg=name
            )
