"""Two gloo ranks under FSDP2, whatever its groups are: an attached model takes the steps of one
process."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import nitp_ops
from tests.distributed.engines.fsdp_groups_cases import (
    CHECKPOINTING,
    EVERY_READER,
    GROUPINGS,
    RANKS,
    Grouping,
    Tapped,
    Values,
    attached,
    cut,
    rows,
    same_steps,
    steps,
    tapped,
    tapped_outside,
    tiny_llama,
)
from tests.support.engine_cases import start

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
]


@cache
def alone(tied: bool, spec: str) -> list[Values]:
    """One process that sees all rows."""
    model = tiny_llama(tied)
    nitp_ops.attach(model, spec)
    return steps(model, attached(model, rows()))


def compare(
    grouping: Grouping, spec: str, checkpointing: str, rank: int, through_tap: bool
) -> None:
    model, batch = tiny_llama(grouping.tied), rows(slice(rank, rank + 1))
    CHECKPOINTING[checkpointing](model)
    if through_tap:
        root = Tapped(model, spec)
        loss = tapped(root, batch)
    else:
        root = model
        nitp_ops.attach(model, spec)
        loss = attached(model, batch)
    cut(root, model, grouping)
    what = f"{grouping.name}, reshard {grouping.reshard}, {spec}, checkpointing {checkpointing}, tap {through_tap}"
    same_steps(steps(root, loss), alone(grouping.tied, spec), what)


def beside(grouping: Grouping, rank: int) -> None:
    """`build` and `tap` around a model that was sharded by itself: the head is called after the
    root's forward."""
    model, batch, spec = (
        tiny_llama(grouping.tied),
        rows(slice(rank, rank + 1)),
        "ntp + 0.5*mtp_shared",
    )
    cut(model, model, grouping)
    what = f"{grouping.name}, reshard {grouping.reshard}, beside"
    same_steps(steps(model, tapped_outside(model, spec, batch)), alone(grouping.tied, spec), what)


def prepared_by_accelerate(tied: bool, reshard: bool, checkpointing: bool, rank: int) -> None:
    """Its own plugin and functions; an Accelerator itself takes no CPU ranks under FSDP2."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=reshard,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
        activation_checkpointing=checkpointing,
    )
    accelerator: Any = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=rank == 0
    )
    model, batch = tiny_llama(tied), rows(slice(rank, rank + 1))
    nitp_ops.attach(model, EVERY_READER)
    plugin.set_auto_wrap_policy(model)
    if checkpointing:
        model = fsdp2_apply_ac(accelerator, model)
    model: Any = fsdp2_prepare_model(accelerator, model)
    what = f"Accelerate, tied {tied}, reshard {reshard}, checkpointing {checkpointing}"
    same_steps(steps(model, attached(model, batch)), alone(tied, EVERY_READER), what)


def planned_by_transformers(rank: int) -> None:
    """Its own plan. Tied weights it ties again after `fully_shard`, where the plain model comes
    apart too."""
    from transformers.distributed.configuration_utils import DistributedConfig
    from transformers.distributed.fsdp import apply_fully_sharded_data_parallelism

    mesh = init_device_mesh("cpu", (RANKS,))
    manager: Any = SimpleNamespace(get_mesh=lambda name: mesh)
    model, batch = tiny_llama(), rows(slice(rank, rank + 1))
    nitp_ops.attach(model, EVERY_READER)
    _, experts, plan = model._resolve_parallel_plans(DistributedConfig(fsdp_size=RANKS))
    apply_fully_sharded_data_parallelism(model, manager, plan, experts)
    same_steps(steps(model, attached(model, batch)), alone(False, EVERY_READER), "transformers")


def worker(rank: int) -> None:
    for grouping in GROUPINGS:
        compare(grouping, EVERY_READER, "none", rank, through_tap=False)
        compare(grouping, EVERY_READER, "none", rank, through_tap=True)
        if "head]" in grouping.name:  # several modules make a group
            beside(grouping, rank)
            compare(grouping, "ntp", "none", rank, through_tap=False)
            # the head is not read
            compare(grouping, "nitp(target_layer=1)", "none", rank, through_tap=False)
        if "norm" in grouping.name and "head]" in grouping.name and not grouping.reshard:
            for checkpointing in CHECKPOINTING:
                compare(
                    grouping, "ntp + 0.3*mtp_sequential", checkpointing, rank, through_tap=False
                )
    for tied in (False, True):
        prepared_by_accelerate(tied, reshard=True, checkpointing=False, rank=rank)
        prepared_by_accelerate(tied, reshard=False, checkpointing=True, rank=rank)
    planned_by_transformers(rank)


def test_an_attached_model_trains_in_every_group_as_on_one_process(tmp_path: Path):
    start(worker, RANKS, tmp_path)
