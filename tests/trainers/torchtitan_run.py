"""torchtitan's Trainer for a few steps on the CPU: ``python torchtitan_run.py '[{"folder": ...,
"steps": ...}, ...]'``.

The runs follow one another in this process; one with a "start" goes on in a copy of that run's
folder.

torchtitan asks for a GPU where it reads memory counters and sets time-outs, and for NCCL where FSDP
sums gradients with a factor; here nothing is counted, no time-out set, and the sum has no factor.
Everything else is its own: config, meta device, FSDP, optimizer, checkpoints.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": os.environ.get("RANK", "0")}
torch.set_num_threads(1)
torch._utils._get_available_device_type = lambda: "cpu"  # type: ignore[attr-defined]

import torchtitan.components.metrics as metrics  # noqa: E402
import torchtitan.distributed.fsdp as fsdp  # noqa: E402
import torchtitan.distributed.utils as distributed  # noqa: E402
import torchtitan.hf_datasets.text_datasets as text_datasets  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402


class NoMonitor:
    device_name = "cpu"

    def get_peak_stats(self) -> metrics.DeviceMemStats:
        return metrics.DeviceMemStats(0, 0, 0, 0, 0, 0)

    def reset_peak_stats(self) -> None:
        pass


def sum_gradients(model: torch.nn.Module) -> None:
    """What a factor of 1 means, in words that gloo knows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


metrics.build_device_memory_monitor = NoMonitor  # type: ignore[assignment]
distributed.set_pg_timeouts = lambda **_: None
fsdp.disable_fsdp_gradient_division = sum_gradients

sys.path.insert(0, str(Path(__file__).parents[2]))
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402

from examples.trainers import torchtitan_train as example  # noqa: E402
from nitp_ops.trainers import torchtitan as adapter  # noqa: E402
from tests.support import packed_texts  # noqa: E402


class Ragged(example.Bytes):
    """Labels that are missing here and there, unequally in every microbatch and rank, and two
    documents a row."""

    @dataclass(kw_only=True, slots=True)
    class Config(example.Bytes.Config):
        pass

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for batch, labels in super().__iter__():
            number = (self.batch - 1) * self.ranks + self.rank
            labels[:, : 5 * (number % 4)] = -100
            cut = 10 + 7 * (number % 3)
            batch["positions"][:, cut:] -= cut
            yield batch, labels


class Log:
    """A logger of torchtitan's that writes into a list."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.rows.append(
            {"step": step} | {k: v for k, v in values.items() if "loss" in k or "objective" in k}
        )

    def close(self) -> None:
        pass


def run(options: dict[str, Any]) -> dict[str, Any]:
    config = example.tiny()
    family = import_module(f"torchtitan.models.{options.get('family', 'llama3')}")
    spec: Any = family.model_registry("debugmodel")
    config.model_spec, model = spec, spec.model
    for layer in model.layers:
        # FlexAttention has no backward on a CPU
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    del model.layers[options.get("layers", 3) :]
    config.objective = options.get("spec", config.objective)
    config.dump_folder = options["folder"]
    config.training.steps = options["steps"]
    config.training.seq_len, config.training.local_batch_size, config.training.global_batch_size = (
        32,
        2,
        8,
    )
    config.training.mixed_precision_param = "float32"
    config.training.max_norm = 1e9
    config.lr_scheduler.warmup_steps, config.lr_scheduler.decay_ratio = 1, None
    config.lr_scheduler.total_steps = 10
    config.metrics.log_freq, config.debug.seed = 1, 0
    config.checkpoint.enable, config.checkpoint.interval = True, options.get("interval", 100)
    config.checkpoint.last_save_model_only = False
    for name, value in options.get("config", {}).items():
        *path, last = name.split(".")
        owner: Any = config
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, value)
    if options.get("ragged"):
        config.dataloader = Ragged.Config()
    if options.get("packed"):
        text_datasets.DATASETS["texts"] = packed_texts.CONFIG
        config.dataloader = text_datasets.HuggingFaceTextDataLoader.Config(dataset="texts")
        config.tokenizer = packed_texts.Tokenizer.Config()
    plain = adapter.derive(config, Trainer.Config)
    trainer: Trainer = (adapter.ObjectiveTrainer if not options.get("plain") else Trainer)(
        config if not options.get("plain") else plain  # type: ignore[arg-type]
    )
    log = Log()
    trainer.metrics_processor.logger = log  # type: ignore[assignment]
    trainer.train()
    (whole,) = trainer.model_parts
    parameters = {
        name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone()
        for name, p in whole.named_parameters()
    }
    saved = list(whole.state_dict())
    trainer.close()
    return {"log": log.rows, "parameters": parameters, "saved": saved}


for options in json.loads(sys.argv[1]):
    if "start" in options and os.environ["RANK"] == "0":
        shutil.copytree(options["start"], options["folder"], dirs_exist_ok=True)
    result = run(options)
    if torch.distributed.get_rank() == 0:
        torch.save(result, Path(options["folder"]) / "result.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
