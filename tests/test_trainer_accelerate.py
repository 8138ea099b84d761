"""A plain loop with Accelerate: windows, also a short last one, take the steps of the formula and resume to the bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trainer_cases import SPEC, ByHand, padded, ragged_rows, tiny_llama

import nitp_ops

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin

from nitp_ops.integrations.accelerate import Accumulation, data_parallel_only

pytestmark = pytest.mark.trainers
RATE = 0.5


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its state in singletons."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState):
        state._reset_state()


def prepared(rows, spec: Any = SPEC, *, optimizer: Any = torch.optim.SGD, rate=RATE, dtype=torch.float64) -> Any:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tiny_llama(dtype)
    accumulation = Accumulation(accelerator, nitp_ops.attach(model, spec))
    accelerator.register_for_checkpointing(accumulation)
    loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=padded)
    return accumulation, *accelerator.prepare(model, optimizer(model.parameters(), lr=rate), loader)


def epoch(accumulation, model, optimizer, loader):
    """The logs of the optimizer steps of one epoch."""
    entries = []
    for batch in accumulation(loader):
        with accumulation.accelerator.accumulate(model):
            accumulation.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        if accumulation.accelerator.sync_gradients:
            entries.append(accumulation.take_log())
    return entries


def test_every_window_takes_the_step_of_the_formula_also_the_short_last_one():
    rows = ragged_rows(7)  # windows of 2 x 2 rows: 4, then 2 + 1
    accumulation, model, optimizer, loader = prepared(rows)
    by_hand = ByHand(tiny_llama(), accumulation.handle.objective)
    for _ in range(2):
        entries = epoch(accumulation, model, optimizer, loader)
        assert len(entries) == 2
        for entry, window in zip(entries, (rows[:4], rows[4:]), strict=True):
            loss = by_hand.loss([padded(window)])
            assert entry["loss"] == pytest.approx(loss.item(), rel=1e-9)
            assert entry["loss"] == entry["loss/ntp"] + entry["loss/nitp"]
            assert entry["ntp/count"] == by_hand.sums(padded(window))["ntp"][1]
            by_hand.step(loss, RATE)
    assert accumulation.step == 4
    by_hand.check(model)


def test_a_scheduled_weight_follows_the_optimizer_steps():
    spec = {"ntp": {}, "nitp": {"weight": [[0, 0.0], [1, 0.5], [3, 0.25]], "target_layer": 1}}
    rows = ragged_rows(7)
    state = prepared(rows, spec)
    by_hand = ByHand(tiny_llama(), state[0].handle.objective)
    entries = epoch(*state) + epoch(*state)
    for entry, weight, window in zip(entries, (0.0, 0.5, 0.5, 0.25), (rows[:4], rows[4:]) * 2, strict=True):
        assert entry["loss/nitp"] == pytest.approx(weight * entry["nitp/loss"], rel=1e-12, abs=0)
        by_hand.step(by_hand.loss([padded(window)], {"ntp": 1.0, "nitp": weight}), RATE)
    by_hand.check(state[1])


def test_a_saved_state_resumes_to_the_bit_and_is_of_one_spec(tmp_path):
    def fresh(spec=SPEC):
        fresh_states = (AcceleratorState, GradientState)
        for state in fresh_states:
            state._reset_state()
        return prepared(ragged_rows(), spec, optimizer=torch.optim.AdamW, rate=1e-2, dtype=torch.float32)

    straight = fresh()
    epoch(*straight)
    straight[0].accelerator.save_state(str(tmp_path))
    expected = epoch(*straight)
    resumed = fresh()
    resumed[0].accelerator.load_state(str(tmp_path))
    assert resumed[0].step == 2
    assert epoch(*resumed) == expected
    parameters = dict(straight[1].named_parameters())
    for name, parameter in resumed[1].named_parameters():
        assert torch.equal(parameter, parameters[name]), name
    other = fresh("ntp + 0.5*nitp(target_layer=1)")
    with pytest.raises(ValueError, match="expected"):
        other[0].accelerator.load_state(str(tmp_path))
    (tmp_path / "custom_checkpoint_0.pkl").unlink()
    with pytest.raises(RuntimeError, match="custom checkpoints"):
        fresh()[0].accelerator.load_state(str(tmp_path))


def test_what_does_not_fit_is_refused():
    accumulation, model, _, loader = prepared(ragged_rows())
    with pytest.raises(TypeError, match="prepare"):
        next(accumulation(torch.utils.data.DataLoader(ragged_rows(), collate_fn=padded)))
    loss = model(**next(iter(loader))).loss
    with pytest.raises(RuntimeError, match="outside"):
        accumulation.backward(loss)
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    plugin = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)
    across = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    with pytest.raises(ValueError, match="sync_with_dataloader"):
        Accumulation(across, accumulation.handle)


@pytest.mark.parametrize(
    "kind, sizes, named",
    [
        (DistributedType.FSDP, {}, "FSDP"),
        (DistributedType.DEEPSPEED, {}, "DEEPSPEED"),
        (DistributedType.MULTI_GPU, {"tp_size": 2}, "tp_size"),
        (DistributedType.MULTI_GPU, {"cp_size": 2}, "cp_size"),
    ],
)
def test_ranks_that_share_more_than_the_batch_are_refused(kind, sizes, named):
    config = SimpleNamespace(**{"tp_size": 1, "cp_size": 1, "sp_size": 1, **sizes})
    accelerator: Any = SimpleNamespace(distributed_type=kind, parallelism_config=config)
    with pytest.raises(NotImplementedError, match=named):
        data_parallel_only(accelerator, "Accumulation")
