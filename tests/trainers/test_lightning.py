"""Lightning's Trainer: windows, steps, logs, checks and checkpoints, against the formula and
against plain runs."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

pytest.importorskip("lightning")
pytest.importorskip("transformers")

import lightning as L
import transformers

import nitp_ops
from nitp_ops.objectives import ModelInfo, Streams, build
from nitp_ops.trainers.lightning import SIDECAR, ObjectiveCallback, objective_loss

pytestmark = [pytest.mark.trainers, pytest.mark.filterwarnings("ignore")]
SPEC = "ntp + 0.8*nitp(target_layer=1)"
LATE = SPEC + " + late: schedule(to=1, warmup=4)*nitp(target_layer=2)"
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
QUIET |= {"accelerator": "cpu", "log_every_n_steps": 1}


def llama() -> Any:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
    }
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.3)
    return transformers.LlamaForCausalLM(config).double()


def rows(count: int = 8, length: int = 10) -> Any:
    """Rows of unequal lengths, labels missing here and there: other counts in every batch, and in
    NTP than in NITP."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(32, (count, length), generator=draw)
    mask = (torch.arange(length) < torch.randint(2, length + 1, (count, 1), generator=draw)).long()
    labels = ids.masked_fill((mask == 0) | (torch.rand(ids.shape, generator=draw) < 0.3), -100)
    labels[0] = -100
    return [
        {"input_ids": i, "attention_mask": m, "labels": y}
        for i, m, y in zip(ids, mask, labels, strict=True)
    ]


class Wrapped(L.LightningModule):
    """Wraps a Hugging Face model, with no word of objectives in it."""

    def __init__(self, model: nn.Module, optimizer: Any = torch.optim.SGD) -> None:
        super().__init__()
        self.model, self.optimizer = model, optimizer

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("validation", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), lr=0.1)


class OwnStreams(L.LightningModule):
    """Builds its streams itself, from a model that is no Hugging Face model, and holds its
    objective."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.lower, self.upper = nn.Embedding(32, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 32, bias=False)
        info = ModelInfo(hidden_size=8, vocab_size=32, num_layers=2)
        self.objective = build(SPEC, model=info)
        self.double()

    def streams(self, batch: Any) -> Streams:
        lower = torch.tanh(self.lower(self.embed(batch["input_ids"])))
        return Streams(
            **tokens(batch),
            last_hidden=self.upper(lower),
            hidden_states={1: lower.detach()},
            head=self.head,
        )

    def training_step(self, batch: Any, index: int) -> Tensor:
        return objective_loss(self, self.streams(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def tokens(batch: Any) -> dict[str, Tensor]:
    names = {"token_ids": "input_ids", "attention_mask": "attention_mask", "labels": "labels"}
    return {field: batch[name] for field, name in names.items()}


class Unsized(IterableDataset):
    """The same rows from a loader without a length: Lightning fetches such batches one ahead."""

    def __iter__(self) -> Any:
        return iter(rows())


def formula(model: Any, batch: dict[str, Tensor], objective: Any) -> Tensor:
    """SPEC, pair by pair."""
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    pairs = [(b, t) for b in range(len(ids)) for t in range(ids.shape[1] - 1) if mask[b, t + 1]]
    ntp = [
        F.cross_entropy(out.logits[b, t], labels[b, t + 1])
        for b, t in pairs
        if labels[b, t + 1] != -100
    ]
    own = objective.terms["nitp"]
    gate, up = own.gate_up.chunk(2)
    h, z = out.hidden_states[-1], out.hidden_states[1].detach()
    p = [own.down @ (F.silu(gate @ h[b, t]) * (up @ h[b, t])) for b, t in pairs]
    nitp = [
        1 - F.cosine_similarity(x, z[b, t + 1], dim=0) for x, (b, t) in zip(p, pairs, strict=True)
    ]
    return torch.stack(ntp).mean() + 0.8 * torch.stack(nitp).mean()


def by_hand(windows: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Parameters after one SGD step on the formula for each window."""
    model = llama()
    info = ModelInfo(
        hidden_size=16, vocab_size=32, num_layers=3, dtype=torch.float64, initializer_range=0.3
    )
    model.add_module("nitp_objective", build(SPEC, model=info))
    plain = llama()
    for window in windows:
        batch = {name: torch.stack([row[name] for row in window]) for name in window[0]}
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if "nitp" not in k})
        named = {
            **dict(plain.named_parameters()),
            **dict(model.nitp_objective.named_parameters(prefix="nitp_objective")),
        }
        found = torch.autograd.grad(
            formula(plain, batch, model.nitp_objective), list(named.values()), allow_unused=True
        )
        with torch.no_grad():
            for name, gradient in zip(named, found, strict=True):
                model.get_parameter(name).sub_(0.1 * gradient)
    return {name: p.detach() for name, p in model.named_parameters()}


def fit(module: Any, data: Any, callback: Any, batch_size: int = 2, **options: Any) -> Any:
    checkpoint = options.pop("ckpt_path", None)
    options = {"max_epochs": 1, "enable_checkpointing": False, **QUIET, **options}
    trainer = L.Trainer(callbacks=[callback], **options)
    trainer.fit(module, DataLoader(data, batch_size=batch_size), ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "count"), [(8, 1, 8), (2, 4, 8), (2, 4, 10), (2, 3, 8), (1, 8, 8)]
)
def test_the_steps_are_those_of_the_formula_however_a_window_is_cut(batch_size, accumulate, count):
    data, size = rows(count), batch_size * accumulate
    expected = by_hand([data[start : start + size] for start in range(0, count, size)])
    module = Wrapped(llama())
    fit(module, data, ObjectiveCallback(SPEC), batch_size, accumulate_grad_batches=accumulate)
    for name, parameter in module.model.named_parameters():
        torch.testing.assert_close(
            parameter, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_loader_without_a_length_is_read_ahead_too():
    expected, module = by_hand([rows()]), Wrapped(llama())
    fit(
        module, Unsized(), ObjectiveCallback(SPEC), accumulate_grad_batches=4, limit_train_batches=4
    )
    for name, parameter in module.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-9, atol=1e-12)


def test_a_module_with_streams_of_its_own_trains_on_the_whole_window():
    whole, parts = OwnStreams(), OwnStreams()
    callbacks = [
        ObjectiveCallback(streams=lambda batch: Streams(**tokens(batch))) for _ in range(2)
    ]
    fit(whole, rows(), callbacks[0], 8)
    fit(parts, rows(), callbacks[1], 2, accumulate_grad_batches=4)
    start = dict(OwnStreams().named_parameters())
    for (name, mine), theirs in zip(parts.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)
        assert not torch.equal(mine, start[name]), name


def test_a_resumed_run_continues_to_the_bit_with_own_parameters_and_schedule(tmp_path: Path):
    whole, first, second = (Wrapped(llama(), torch.optim.AdamW) for _ in range(3))
    fit(whole, rows(), ObjectiveCallback(LATE), max_epochs=2, accumulate_grad_batches=2)
    trainer = fit(first, rows(), ObjectiveCallback(LATE), accumulate_grad_batches=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    options = {"max_epochs": 2, "accumulate_grad_batches": 2, "ckpt_path": tmp_path / "half.ckpt"}
    fit(second, rows(), ObjectiveCallback(LATE, seed=9), **options)
    for name, parameter in whole.named_parameters():
        assert torch.equal(second.get_parameter(name), parameter), name
    half, weights = (
        torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("half", "weights")
    )
    own = {f"terms.{t}.{p}" for t in ("nitp", "late") for p in ("gate_up", "down")}
    assert set(half[SIDECAR]["parameters"]) == own
    assert SIDECAR not in weights and not any(
        "nitp" in key for key in [*weights["state_dict"], *half["state_dict"]]
    )


def test_a_checkpoint_of_another_objective_or_of_none_is_refused(tmp_path: Path):
    module = Wrapped(llama())
    fit(module, rows(), ObjectiveCallback(SPEC)).save_checkpoint(tmp_path / "spec.ckpt")
    trainer = L.Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    trainer.fit(Wrapped(llama()), DataLoader(rows(), batch_size=2))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(
        ValueError,
        match=r"the checkpoint has the spec \{'ntp'.*, expected "
        r"\{'ntp'.*'late'",
    ):
        fit(
            Wrapped(llama()),
            rows(),
            ObjectiveCallback(LATE),
            ckpt_path=tmp_path / "spec.ckpt",
            max_epochs=2,
        )
    with pytest.raises(ValueError, match="the checkpoint has no nitp_objective, expected one"):
        fit(
            Wrapped(llama()),
            rows(),
            ObjectiveCallback(SPEC),
            ckpt_path=tmp_path / "plain.ckpt",
            max_epochs=2,
        )


def test_logged_components_sum_to_the_logged_loss_of_the_window():
    module, seen = Wrapped(llama()), []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            seen.append({k: v.item() for k, v in trainer.logged_metrics.items()})

    callback = ObjectiveCallback(LATE)
    trainer = L.Trainer(
        callbacks=[callback, Watch()],
        max_epochs=3,
        enable_checkpointing=False,
        accumulate_grad_batches=4,
        **QUIET,
    )
    trainer.fit(module, DataLoader(rows(), batch_size=2))
    logged = trainer.logged_metrics
    parts = sum(logged[f"objective/loss/{part}"].item() for part in ("ntp", "nitp", "late"))
    assert parts == pytest.approx(logged["objective/loss"].item(), rel=1e-6)
    # the third step: global step 2 of a warm-up of 4
    assert logged["objective/loss/late"].item() == pytest.approx(
        0.5 * logged["objective/late/loss"].item(), rel=1e-6
    )
    assert logged["objective/ntp/count"] == sum((row["labels"][1:] != -100).sum() for row in rows())


def test_an_optimizer_without_the_own_parameters_is_an_error_before_step_0():
    module = Wrapped(llama())
    trained = list(module.model.parameters())
    module.configure_optimizers = lambda: torch.optim.SGD(trained, lr=0.1)  # type: ignore[method-assign]
    with pytest.raises(
        ValueError,
        match=r"terms\.nitp\.gate_up, terms\.nitp\.down of the "
        r"objective in no group",
    ):
        fit(module, rows(), ObjectiveCallback(SPEC))
    assert all(
        torch.equal(mine, start) for mine, start in zip(trained, llama().parameters(), strict=True)
    )


def test_evaluation_is_that_of_the_plain_model():
    module, callback = Wrapped(llama()), ObjectiveCallback(SPEC)
    fit(module, rows(), callback, accumulate_grad_batches=4)
    plain = llama()
    plain.load_state_dict(module.model.state_dict())
    module.eval()
    plain.eval()
    batch = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    mine, theirs = module.model(**batch), plain(**batch)
    assert torch.equal(mine.loss, theirs.loss) and torch.equal(mine.logits, theirs.logits)


def test_what_does_not_fit_is_named():
    with pytest.raises(
        ValueError,
        match=r"requires external\[balance\], expected only .*: "
        r"token_ids, last_hidden",
    ):
        fit(Wrapped(llama()), rows(), ObjectiveCallback("ntp + balance: external"))
    manual = Wrapped(llama())
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="automatic_optimization is False, expected True"):
        fit(manual, rows(), ObjectiveCallback(SPEC))
    two = Wrapped(llama())
    two.teacher = copy.deepcopy(two.model)
    with pytest.raises(
        ValueError, match="2 Hugging Face models among model, teacher, expected one"
    ):
        fit(two, rows(), ObjectiveCallback(SPEC))
    fit(two, rows(), ObjectiveCallback(SPEC, model="model"))
    with pytest.raises(ValueError, match="holds 0 objectives, expected a spec or one"):
        fit(Wrapped(llama()), rows(), ObjectiveCallback())
    with pytest.raises(TypeError, match="streams is None, expected a function"):
        fit(OwnStreams(), rows(), ObjectiveCallback())
    attached = Wrapped(llama())
    nitp_ops.attach(attached.model, SPEC)  # type: ignore[arg-type]
    for streams in (None, lambda batch: Streams(**tokens(batch))):
        with pytest.raises(
            ValueError,
            match="spec is None and model is attached already, expected the spec that it was",
        ):
            fit(attached, rows(), ObjectiveCallback(streams=streams))
    fit(attached, rows(), ObjectiveCallback(SPEC))


def test_the_example_runs():
    path = Path(__file__).parents[2] / "examples/trainers/lightning_fit.py"
    # a tiny model: threads would wait for each other
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    printed = dict(
        line.split() for line in done.stdout.splitlines() if line.startswith(("loss", "nitp"))
    )
    assert float(printed["loss"]) == pytest.approx(
        float(printed["loss/ntp"]) + float(printed["loss/nitp"]), abs=2e-4
    )
    assert float(printed["loss/ntp"]) < 4
