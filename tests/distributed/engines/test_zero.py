"""Two gloo processes under DeepSpeed ZeRO 1, 2 and 3: gradients and updated weights are those of
one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nitp_ops.objectives import build
from tests.distributed.engines.fsdp_groups_cases import EVERY_READER, rows, tiny_llama
from tests.support.engine_cases import SPECS, Model, packed_batch, start
from tests.support.objectives_cases import INFO, Batch

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
]
RANKS, RATE = 2, 0.5
ZERO_3 = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
FLOAT32 = replace(INFO, dtype=torch.float32)
# every objective under ZeRO-3, which hides parameters; all together where only optimizer state or
# gradients are cut
CASES = [(3, spec) for spec in SPECS.values()] + [
    (1, SPECS["all at once"]),
    (2, SPECS["all at once"]),
]


def model_of(spec: str, batch: Batch) -> Model:
    return Model(spec, batch, FLOAT32).float()


def alone(spec: str, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(gradients, weights after one step of plain gradient descent) of one process, in float64."""
    model = model_of(spec, batch).double()
    model(batch).loss.backward()
    gradients = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }
    return gradients, {n: p.detach() - RATE * gradients[n] for n, p in model.named_parameters()}


def close(mine: Tensor, expected: Tensor, what: str) -> None:
    """Within float32 rounding of the largest entry: sums over rows cancel."""
    error = (mine.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error < 1e-5, f"{what}: largest error {error:.1e}"


def step(stage: int, spec: str, batch: Batch, rank: int) -> None:
    import deepspeed

    what = f"ZeRO-{stage}: {spec}"
    model = model_of(spec, batch)
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.0,  # the default is 1
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            # 0: also the smallest parameter is cut
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        },
    )
    window = [batch.part(slice(row, row + 1)) for row in (2 * rank, 2 * rank + 1)]
    counts = (model.count(window[0]) + model.count(window[1])).all_reduce()
    gradients, weights = alone(spec, batch)
    for part in window:
        # the counts are those of the window: DeepSpeed must not divide by its steps again
        engine.backward(engine(part, counts=counts).loss, scale_wrt_gas=False)
        if part is window[-1]:
            for parameter, name in names.items():
                mine = deepspeed.utils.safe_get_full_grad(parameter)
                assert mine is not None or not gradients[name].any(), (
                    f"{what}: {name} has no gradient"
                )
                if mine is not None:
                    close(mine, gradients[name], f"{what}: gradient of {name}")
        engine.step()
    for parameter, name in names.items():
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            close(parameter, weights[name], f"{what}: {name} after a step")
    engine.destroy()


def attached_to_a_llama(rank: int) -> None:
    """The model's own call of its head, on no rows, gathers nothing; the objective's does."""
    import deepspeed

    from nitp_ops.attaching import attach

    expected: Any = tiny_llama(dtype=torch.float32)
    attach(expected, EVERY_READER)
    expected.double()(**rows()).loss.backward()
    model = tiny_llama(dtype=torch.float32)
    handle = attach(model, EVERY_READER)
    names = {parameter: name for name, parameter in model.named_parameters()}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
    )
    batch = rows(slice(rank, rank + 1))
    handle.set_counts(handle.count(batch).all_reduce())
    engine.backward(engine(**batch).loss)
    for parameter, name in names.items():
        mine = deepspeed.utils.safe_get_full_grad(parameter)
        assert mine is not None, f"attached: {name} has no gradient"
        close(mine, expected.get_parameter(name).grad, f"attached: {name}")
    engine.destroy()


def built_where_parameters_are_cut_at_once(spec: str) -> None:
    """Inside ``deepspeed.zero.Init`` the initial values are those of a plain build."""
    import deepspeed

    plain = build(spec, model=FLOAT32)
    # no dtype: given one, DeepSpeed 0.19 makes everything bfloat16 on a CPU
    with deepspeed.zero.Init(config_dict_or_path=ZERO_3):
        cut = build(spec, model=FLOAT32)
    for name, parameter in plain.named_parameters():
        mine = cut.get_parameter(name)
        assert hasattr(mine, "ds_id"), f"{spec}: {name} is not cut"
        with deepspeed.zero.GatheredParameters([mine]):
            assert torch.equal(mine, parameter), f"{spec}: {name}"


def worker(rank: int) -> None:
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    batch = packed_batch()
    for stage, spec in CASES:
        step(stage, spec, batch, rank)
    attached_to_a_llama(rank)
    for spec in SPECS.values():
        built_where_parameters_are_cut_at_once(spec)


def test_every_objective_trains_under_zero_as_on_one_process(tmp_path: Path):
    start(worker, RANKS, tmp_path)
