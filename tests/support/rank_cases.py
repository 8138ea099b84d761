"""Cases that run on several gloo processes: one spawn for all cases of a module, one result a case
and rank.

A rank that raises or dies in a case tells the others nothing: their next collective fails, by a
mismatch or after SECONDS. Then all processes end, and cases that were not reached say so.
"""

from __future__ import annotations

import datetime
import importlib
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

import nitp_ops
from nitp_ops.distributed import VocabularyShards

SECONDS = 60
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def _worker(rank: int, ranks: int, folder: str, module: str) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=limit
    )
    found = {}
    for name, case in importlib.import_module(module).CASES.items():
        torch.manual_seed(0)
        try:
            case()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        torch.save(found, Path(folder) / f"{rank}.pt")
    if not any(found.values()):
        dist.barrier()  # no rank closes the connections of the other's last collective
    dist.destroy_process_group()


def results(ranks: int, folder: Path, module: str) -> dict[str, str]:
    """{case: what went wrong, of every rank; "" where nothing did}."""
    if not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    ended = "all cases ran"
    try:
        spawn(_worker, args=(ranks, str(folder), module), nprocs=ranks)
    except (ProcessExitedException, ProcessRaisedException) as error:
        ended = str(error)
    files = [folder / f"{rank}.pt" for rank in range(ranks)]
    found = [torch.load(file) if file.exists() else {} for file in files]
    names = importlib.import_module(module).CASES
    wrong = {name: [own.get(name, f"not reached: {ended}") for own in found] for name in names}
    return {
        name: "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)
        for name, texts in wrong.items()
    }


def outcome_of(module: str, *counts: int) -> Any:
    """A fixture: the results of a module's cases on each number of ranks."""

    @pytest.fixture(scope="module", params=counts)
    def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
        return results(request.param, tmp_path_factory.mktemp("ranks"), module)

    return outcome


def over_ranks(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Any:
    """`linear_cross_entropy` of this rank's part of the weight, options of VocabularyShards among
    the others."""
    of_shards = {
        name: options.pop(name) for name in VocabularyShards.__dataclass_fields__ if name in options
    }
    return nitp_ops.linear_cross_entropy(
        hidden, weight, labels, group=VocabularyShards(**of_shards), **options
    )
