"""A plain loop with Accelerate: windows, also a short last one, take the steps of the formula and
resume to the bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nitp_ops
from tests.support.trainer_cases import SPEC, WEIGHT, ByHand, padded, ragged_rows, tiny_llama

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin

from nitp_ops.trainers.accelerate import Accumulation, data_parallel_only

pytestmark = [pytest.mark.trainers, pytest.mark.usefixtures("fresh_accelerate")]
RATE = 0.5


def prepared(
    rows, spec: Any = SPEC, *, optimizer: Any = torch.optim.SGD, rate=RATE, dtype=torch.float64
) -> Any:
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
    for entry, weight, window in zip(
        entries, (0.0, 0.5, 0.5, 0.25), (rows[:4], rows[4:]) * 2, strict=True
    ):
        assert entry["loss/nitp"] == pytest.approx(weight * entry["nitp/loss"], rel=1e-12, abs=0)
        by_hand.step(by_hand.loss([padded(window)], {"ntp": 1.0, "nitp": weight}), RATE)
    by_hand.check(state[1])


def test_a_saved_state_resumes_to_the_bit_and_is_of_one_spec(tmp_path):
    def fresh(spec=SPEC):
        fresh_states = (AcceleratorState, GradientState)
        for state in fresh_states:
            state._reset_state()
        return prepared(
            ragged_rows(), spec, optimizer=torch.optim.AdamW, rate=1e-2, dtype=torch.float32
        )

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


def test_nothing_is_logged_before_a_step_and_nothing_twice():
    accumulation, model, optimizer, loader = prepared(ragged_rows(4))
    assert accumulation.take_log() == {}
    (entry,) = epoch(accumulation, model, optimizer, loader)
    assert entry["loss"] > 0 and accumulation.take_log() == {}


def test_a_loop_that_is_left_inside_a_window_leaves_nothing_to_the_next_one():
    rows = ragged_rows(7)
    accumulation, model, optimizer, loader = prepared(rows)
    by_hand = ByHand(tiny_llama(), accumulation.handle.objective)
    for held in (False, True):  # a loop that still exists may end only when the next one runs
        batches = accumulation(loader)
        for batch in batches:
            with accumulation.accelerator.accumulate(model):
                accumulation.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
            break
        if not held:
            del batches
            own = padded(rows[:2])
            torch.testing.assert_close(model(**own).loss, by_hand.loss([own]), rtol=1e-9, atol=0)
        assert accumulation.take_log() == {} and accumulation.step == 0 + 2 * held
        entries = []
        for index, batch in enumerate(accumulation(loader)):
            if held and index == 1:
                batches.close()
            with accumulation.accelerator.accumulate(model):
                accumulation.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
            if accumulation.accelerator.sync_gradients:
                entries.append(accumulation.take_log())
        for entry, window in zip(entries, (rows[:4], rows[4:]), strict=True):
            loss = by_hand.loss([padded(window)])
            assert entry["loss"] == pytest.approx(loss.item(), rel=1e-9)
            by_hand.step(loss, RATE)
    by_hand.check(model)


def test_a_batch_that_is_skipped_moves_no_window():
    rows = ragged_rows(8)
    accumulation, model, optimizer, loader = prepared(rows)
    by_hand = ByHand(tiny_llama(), accumulation.handle.objective)
    for index, batch in enumerate(accumulation(loader)):
        if index == 0:
            continue
        with accumulation.accelerator.accumulate(model):
            accumulation.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    found = [by_hand.sums(padded(rows[at : at + 2])) for at in (0, 2)]
    share: Any = sum(
        weight * found[1][term][0] / (found[0][term][1] + found[1][term][1])
        for term, weight in {"ntp": 1.0, "nitp": WEIGHT}.items()
    )
    by_hand.step(share, RATE)  # the skipped batch was counted
    by_hand.step(by_hand.loss([padded(rows[4:])]), RATE)
    by_hand.check(model)


def test_skipped_first_batches_are_not_counted():
    rows = ragged_rows(7)
    accumulation, model, optimizer, loader = prepared(rows)
    by_hand = ByHand(tiny_llama(), accumulation.handle.objective)
    epoch(accumulation, model, optimizer, accumulation.accelerator.skip_first_batches(loader, 1))
    for window in (rows[2:6], rows[6:]):
        by_hand.step(by_hand.loss([padded(window)]), RATE)
    by_hand.check(model)


def test_a_loss_of_the_users_own_is_averaged_as_accelerate_averages_it():
    rows = ragged_rows(4)
    accumulation, model, optimizer, loader = prepared(rows)
    by_hand = ByHand(tiny_llama(), accumulation.handle.objective)
    plain: Any = by_hand.plain
    for batch in accumulation(loader):
        with accumulation.accelerator.accumulate(model):
            accumulation.backward(model(**batch).loss + model.lm_head.weight.square().sum())
            optimizer.step()
            optimizer.zero_grad()
    by_hand.step(by_hand.loss([padded(rows)]) + plain.lm_head.weight.square().sum(), RATE)
    by_hand.check(model)


def test_a_window_without_any_label_is_no_ntp():
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in ragged_rows(4)]
    accumulation, model, optimizer, loader = prepared(rows, "ntp")
    (entry,) = epoch(accumulation, model, optimizer, loader)
    assert entry["loss"] == entry["loss/ntp"] == entry["ntp/count"] == 0
    assert all(
        torch.equal(model.get_parameter(name), p) for name, p in tiny_llama().named_parameters()
    )


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
