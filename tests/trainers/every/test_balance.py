"""A loss that the model adds to its own (the balance of its experts) is a mean over the
microbatches of a window.

However a window is cut, the step is that of ``sum CE / count + mean of what the model adds``, and
the log shows its part of the loss.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

import nitp_ops
from tests.support.hugging_face_cases import make
from tests.support.trainer_cases import trainer_arguments

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from accelerate import Accelerator
from transformers import Trainer

from nitp_ops.trainers.accelerate import Accumulation
from nitp_ops.trainers.transformers import ObjectiveTrainer

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("fresh_accelerate"),
]
# rows of a microbatch, microbatches; the last one ends with a single row
CUTS = [(4, 1), (1, 4), (2, 2), (3, 2)]
COEFFICIENT = 0.5


def experts(family: str = "mixtral") -> Any:
    return make(
        family, output_router_logits=True, router_aux_loss_coef=COEFFICIENT, num_hidden_layers=2
    )


def rows() -> Any:
    """Four rows of equal length, whose labels differ in number."""
    ids = torch.randint(3, 64, (4, 10), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    for index in range(4):
        labels[index, : 1 + 2 * index] = -100
    return [{"input_ids": row, "labels": own} for row, own in zip(ids, labels, strict=True)]


def collate(part: Any) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in part]) for name in part[0]}


def microbatches(size: int) -> list[dict[str, Tensor]]:
    return [collate(rows()[start : start + size]) for start in range(0, 4, size)]


def expected(
    model: Any, size: int, shares: list[float] | None = None
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The two parts of the loss, and the gradients of their sum, of the plain model."""
    batches = microbatches(size)
    outs = [model(input_ids=batch["input_ids"]) for batch in batches]
    labels = [batch["labels"][:, 1:].flatten() for batch in batches]
    total: Any = sum(
        F.cross_entropy(out.logits[:, :-1].flatten(0, 1), own, reduction="sum")
        for out, own in zip(outs, labels, strict=True)
    )
    ntp = total / sum((own != -100).sum() for own in labels)
    shares = shares or [1 / len(outs)] * len(outs)
    balance: Any = COEFFICIENT * sum(
        share * out.aux_loss for share, out in zip(shares, outs, strict=True)
    )
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(ntp + balance, parameters)
    return {"ntp": ntp.item(), "aux_loss": balance.item()}, dict(zip(names, gradients, strict=True))


def check_step(
    model: Any,
    size: int,
    log: dict[str, float] | None = None,
    family: str = "mixtral",
    *,
    shares: list[float] | None = None,
    rtol: float = 1e-9,
) -> None:
    """The model took one step of plain gradient descent at a rate of 1."""
    plain = experts(family)
    parts, gradients = expected(plain, size, shares)
    for name, start in plain.named_parameters():
        found = start - model.get_parameter(name)
        # the model computes its balance loss in float32
        torch.testing.assert_close(
            found, gradients[name], rtol=1e-5, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}"
        )
    if log is not None:
        assert log["loss/ntp"] == pytest.approx(parts["ntp"], rel=rtol)
        assert log["loss/aux_loss"] == pytest.approx(parts["aux_loss"], rel=1e-6)
        assert log["loss"] == pytest.approx(log["loss/ntp"] + log["loss/aux_loss"], rel=1e-6)


def one_step(
    folder: Any,
    cls: Any,
    model: Any,
    size: int,
    steps: int,
    *,
    config: Any = None,
    given: Any = None,
    **options: Any,
) -> dict[str, float]:
    """One step of a Hugging Face trainer, and its log."""
    objective = {"objective": options.pop("objective")} if "objective" in options else {}
    arguments = trainer_arguments(
        folder,
        config,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        max_steps=1,
        learning_rate=1.0,
        train_sampling_strategy="sequential",
        **options,
    )
    given = given or {"train_dataset": rows(), "data_collator": collate}
    trainer = cls(model=model, args=arguments, **given, **objective)
    trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize(
    ("family", "size", "steps"), [*(("mixtral", *cut) for cut in CUTS), ("qwen3_moe", 2, 2)]
)
def test_a_loop_with_accelerate_averages_it_over_the_microbatches(family, size, steps):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    model = experts(family)
    accumulation = Accumulation(accelerator, nitp_ops.attach(model, "ntp"))
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1.0)
    loader: Any = DataLoader(rows(), batch_size=size, collate_fn=collate)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in accumulation(loader):
        with accelerator.accumulate(prepared):
            accumulation.backward(prepared(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    check_step(model, size, accumulation.take_log(), family)


@pytest.mark.parametrize(("size", "steps"), CUTS[2:])
def test_the_hugging_face_trainer_averages_it_over_the_microbatches(tmp_path, size, steps):
    model = experts()
    check_step(
        model, size, one_step(tmp_path, ObjectiveTrainer, model, size, steps, objective="ntp")
    )


def test_the_stock_trainer_weighs_it_by_the_share_of_the_labels(tmp_path):
    model = experts()
    nitp_ops.attach(model, "ntp")
    one_step(tmp_path, Trainer, model, 2, 2)
    labels = [(batch["labels"][:, 1:] != -100).sum().item() for batch in microbatches(2)]
    check_step(model, 2, shares=[own / sum(labels) for own in labels])


class WithAPenalty(ObjectiveTrainer):
    """A loss of one's own beside the objective."""

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return (
            super().compute_loss(model, *args, **kwargs)
            + 0.01 * model.lm_head.weight.square().sum()
        )


def test_a_loss_of_a_subclass_is_averaged_too(tmp_path):
    model = experts()
    one_step(tmp_path, WithAPenalty, model, 1, 4, objective="ntp")
    with torch.no_grad():
        model.lm_head.weight += 0.02 * experts().lm_head.weight
    check_step(model, 1)


def test_trl_takes_the_same_step_with_and_without_the_objective(tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import ByT5Tokenizer
    from trl import SFTConfig, SFTTrainer  # type: ignore[reportPrivateImportUsage]

    from nitp_ops.trainers.trl import ObjectiveSFTTrainer

    models, logs = (experts(), experts()), []
    data = Dataset.from_list(
        [{name: value.tolist() for name, value in row.items()} for row in rows()]
    )
    for model, cls in zip(models, (SFTTrainer, ObjectiveSFTTrainer), strict=True):
        options: dict[str, Any] = {"gradient_checkpointing": False, "bf16": False, "max_length": 64}
        options |= {"objective": "ntp"} if cls is ObjectiveSFTTrainer else {}
        given = {"train_dataset": data, "processing_class": ByT5Tokenizer()}
        logs.append(one_step(tmp_path, cls, model, 2, 2, config=SFTConfig, given=given, **options))
    for name, theirs in models[0].named_parameters():
        torch.testing.assert_close(models[1].get_parameter(name), theirs, rtol=1e-5, atol=1e-7)
    check_step(models[1], 2, logs[1])
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], rel=1e-6)
    assert logs[1]["loss/aux_loss"] == pytest.approx(COEFFICIENT * logs[0]["aux_loss"], rel=1e-6)


@pytest.mark.parametrize(("size", "steps"), CUTS[2:])
def test_lightning_averages_it_over_the_microbatches(size, steps):
    L = pytest.importorskip("lightning")
    from nitp_ops.trainers.lightning import ObjectiveCallback
    from tests.trainers.cases.lightning import QUIET, Wrapped

    module = Wrapped(experts())
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1.0)  # type: ignore[method-assign]
    trainer = L.Trainer(
        callbacks=[ObjectiveCallback("ntp")],
        max_epochs=1,
        accumulate_grad_batches=steps,
        enable_checkpointing=False,
        **QUIET,
    )
    trainer.fit(module, DataLoader(rows(), batch_size=size, collate_fn=collate))
    logged = {
        name.removeprefix("objective/"): value.item()
        for name, value in trainer.logged_metrics.items()
    }
    check_step(module.model, size, logged, rtol=1e-6)  # Lightning logs in float32


def test_a_term_may_not_take_its_name():
    with pytest.raises(ValueError, match='a term is labelled "aux_loss", expected another label'):
        nitp_ops.attach(experts(), "ntp + aux_loss: nitp")
    nitp_ops.attach(experts(), "ntp + aux_loss: 0.1*external")  # takes its place


def test_a_plain_loop_with_counts_averages_it_over_the_microbatches():
    for size, _ in CUTS:
        model = experts()
        handle = nitp_ops.attach(model, "ntp")
        batches = microbatches(size)
        counted = [handle.count(batch) for batch in batches]
        handle.set_counts(sum(counted[1:], start=counted[0]))
        measured: Any = None
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            total += loss.detach()
            measured = handle.metrics if measured is None else measured + handle.metrics
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= parameter.grad
        log = measured.compute()
        assert log["loss"] == pytest.approx(total.item(), rel=1e-9)
        check_step(model, size, log)
