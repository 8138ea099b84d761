"""Trainers on packed rows: the same steps by labels and by shift_labels, no matter who made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nitp_ops
from tests.support.trainer_cases import ragged_rows, tiny_llama, trainer_arguments

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import Trainer

from nitp_ops.trainers.accelerate import Accumulation
from nitp_ops.trainers.transformers import ObjectiveTrainer

pytestmark = [pytest.mark.trainers, pytest.mark.filterwarnings("ignore")]
SPEC = "ntp + 0.3*mtp_shared(offsets=[2]) + 0.8*nitp(target_layer=1)"


def packed(rows: Any) -> dict[str, Tensor]:
    """All rows in one, every token a label: the first of a document too, which no mask but the
    boundary keeps out."""
    ids = torch.tensor([[x for row in rows for x in row["input_ids"]]])
    positions = torch.tensor([[x for row in rows for x in range(len(row["input_ids"]))]])
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": positions}


def shifted(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """With shift_labels made over the whole row, as trainers make them under context parallel."""
    return batch | {"shift_labels": F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]}


def of_documents(rows: Any) -> dict[str, Tensor]:
    """Each document shifted by itself, one token shorter; all its labels are shift_labels."""
    shorter = [{"input_ids": row["input_ids"][:-1]} for row in rows]
    labels = torch.tensor([[x for row in rows for x in row["input_ids"][1:]]])
    return packed(shorter) | {"shift_labels": labels}


def shifting(cls: Any) -> Any:
    """The trainer, which now makes shift_labels of the labels before it calls the model."""

    class Shifting(cls):
        def _prepare_inputs(self, inputs: Any) -> Any:
            inputs = super()._prepare_inputs(inputs)
            return shifted(inputs) if self.model.training else inputs

    return Shifting


def trained(
    cls: Any, folder: Path, collate: Any = packed, **options: Any
) -> tuple[Any, dict[str, Tensor]]:
    """(log, parameters) after two windows of two microbatches of two documents."""
    arguments = trainer_arguments(
        folder, options.pop("arguments", None), per_device_train_batch_size=2, gradient_accumulation_steps=2,
        num_train_epochs=1, remove_unused_columns=False, **options.pop("extra", {}),
    )  # fmt: skip
    model = options.pop("model", None) or tiny_llama()
    options.setdefault("train_dataset", ragged_rows())
    trainer = cls(model=model, args=arguments, data_collator=collate, **options)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return log, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def same(
    found: tuple[Any, dict[str, Tensor]],
    expected: tuple[Any, dict[str, Tensor]],
    atol: float = 1e-12,
) -> None:
    for mine, other in zip(found[0], expected[0], strict=True):
        for name in (name for name in other if "loss" in name or "count" in name):
            assert mine[name] == pytest.approx(other[name], rel=1e-6), name
    for name, value in expected[1].items():
        torch.testing.assert_close(
            found[1][name], value, rtol=1e-9, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_shift_labels_that_the_trainer_makes_train_like_the_labels(tmp_path):
    expected = trained(ObjectiveTrainer, tmp_path, objective=SPEC)
    assert len(expected[0]) == 2
    same(trained(shifting(ObjectiveTrainer), tmp_path, objective=SPEC), expected)
    # of the collator, whose word it is
    collated = trained(
        ObjectiveTrainer,
        tmp_path,
        lambda rows: shifted(packed(rows)),
        objective=SPEC,
        label_layout="stream",
    )
    same(collated, expected)
    model = tiny_llama()
    nitp_ops.attach(model, SPEC, label_layout="stream")
    same(
        trained(ObjectiveTrainer, tmp_path, lambda rows: shifted(packed(rows)), model=model),
        expected,
    )


def test_shift_labels_of_documents_train_as_the_stock_trainer_does(tmp_path):
    expected = trained(Trainer, tmp_path, of_documents)
    found = trained(
        ObjectiveTrainer, tmp_path, of_documents, objective="ntp + 0*mtp_shared(offsets=[2])"
    )
    lengths = [len(row["input_ids"]) - 1 for row in ragged_rows()]
    assert sum(entry["ntp/count"] for entry in found[0]) == sum(lengths)
    assert sum(entry["mtp_shared/2/count"] for entry in found[0]) == sum(n - 1 for n in lengths)
    same(found, expected, atol=1e-6)  # the stock loss is formed in float32
    # and an attached model under the stock trainer, by the share of its labels
    model = tiny_llama()
    nitp_ops.attach(model, "ntp")
    same(trained(Trainer, tmp_path, of_documents, model=model), expected, atol=1e-6)


def test_trl_counts_its_shift_labels_like_its_labels(tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import ByT5Tokenizer
    from trl import SFTConfig  # type: ignore[reportPrivateImportUsage]

    from nitp_ops.trainers.trl import ObjectiveSFTTrainer

    options: dict[str, Any] = {
        "processing_class": ByT5Tokenizer(), "arguments": SFTConfig, "objective": SPEC,
        "extra": {"gradient_checkpointing": False, "bf16": False, "dataset_kwargs": {"skip_prepare_dataset": True}},
    }  # fmt: skip
    found, expected = (
        trained(cls, tmp_path, train_dataset=Dataset.from_list(ragged_rows()), **options)
        for cls in (shifting(ObjectiveSFTTrainer), ObjectiveSFTTrainer)
    )
    same(found, expected)


def test_axolotl_counts_its_shift_labels_like_its_labels_and_its_config_names_the_layout_of_the_data(
    tmp_path,
):
    pytest.importorskip("axolotl.integrations.base")
    from axolotl.utils.dict import DictDefault
    from datasets import Dataset

    from nitp_ops.trainers.axolotl import ObjectiveArgs, ObjectivePlugin
    from tests.trainers.test_axolotl import Arguments

    plugin, data, found = ObjectivePlugin(), Dataset.from_list(ragged_rows()), []
    for shifts, layout in ((False, None), (True, None), (False, "stream")):
        cfg, model = DictDefault(nitp_objective=SPEC, nitp_label_layout=layout), tiny_llama()
        plugin.post_model_load(cfg, model)
        cls = plugin.get_trainer_cls(cfg)
        collate = packed if layout is None else lambda rows: shifted(packed(rows))
        cls = shifting(cls) if shifts else cls
        found.append(
            trained(cls, tmp_path, collate, model=model, arguments=Arguments, train_dataset=data)
        )
    same(found[1], found[0])
    same(found[2], found[0])
    with pytest.raises(ValueError, match="nitp_label_layout"):
        ObjectiveArgs(nitp_objective="ntp", nitp_label_layout="packed")  # type: ignore[arg-type]


def test_a_loop_with_accelerate_counts_shift_labels_as_it_was_told():
    found = []
    for layout, change in (("document", dict), ("stream", shifted)):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = tiny_llama().train()
        accumulation = Accumulation(accelerator, nitp_ops.attach(model, SPEC, label_layout=layout))  # type: ignore[arg-type]
        data: Any = DataLoader(ragged_rows(), batch_size=2, collate_fn=packed)
        model, loader = accelerator.prepare(model, data)
        for batch in accumulation(loader):  # counted as labels, trained on as shift_labels
            with accelerator.accumulate(model):
                accumulation.backward(model(**change(batch)).loss)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        found.append(([accumulation.take_log()], gradients))
    same(found[1], found[0])


def test_lightning_counts_shift_labels_as_it_was_told():
    L = pytest.importorskip("lightning")
    from nitp_ops.trainers.lightning import ObjectiveCallback
    from tests.trainers.cases.lightning import QUIET, Wrapped

    found, cases = [], (("document", packed), ("stream", lambda rows: shifted(packed(rows))))
    for layout, collate in cases:
        module = Wrapped(tiny_llama())
        callback = ObjectiveCallback(SPEC, label_layout=layout)  # type: ignore[arg-type]
        loader = DataLoader(ragged_rows(), batch_size=2, collate_fn=collate)
        options = {**QUIET, "enable_checkpointing": False, "accumulate_grad_batches": 2}
        L.Trainer(callbacks=[callback], max_epochs=1, **options).fit(module, loader)
        found.append(([], dict(module.named_parameters())))
    same(found[1], found[0])
