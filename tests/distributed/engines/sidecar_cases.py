"""The sidecar on two ranks of which one fails: both raise at once, with the reason, and can go on
afterwards."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nitp_ops.attaching import sidecar
from nitp_ops.objectives import CompositeObjective, ModelInfo, build


def objective(value: float = 0.0, sharded: bool = False) -> CompositeObjective:
    made = build("ntp + nitp", model=ModelInfo(hidden_size=4, vocab_size=8, num_layers=4))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(value)
    if sharded:
        fully_shard(made, mesh=init_device_mesh("cpu", (2,)))
    return made


def values(made: CompositeObjective) -> set[float]:
    return {
        value
        for whole in made.state_dict().values()
        for value in sidecar._whole(whole).flatten().tolist()
    }


def folder_for_both() -> Path:
    shared: list[str | None] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared, src=0)
    return Path(str(shared[0]))


def raised(call, *arguments) -> Exception:
    begin = time.monotonic()
    try:
        call(*arguments)
    except Exception as error:
        assert time.monotonic() - begin < 20
        return error
    raise AssertionError("nothing was raised")


def rank_zero_can_not_write() -> None:
    folder = folder_for_both()
    if dist.get_rank() == 0:
        (folder / "file").touch()
    for sharded in (False, True):
        error = raised(sidecar.save, objective(1, sharded), folder / "file" / "folder")
        if dist.get_rank() == 0:
            assert isinstance(error, OSError), error
        else:
            assert isinstance(error, RuntimeError) and str(error).startswith(
                "save: rank 0 failed: NotADirectoryError"
            )


def one_rank_has_no_values_to_save() -> None:
    folder = folder_for_both()
    for sharded in (False, True):
        for partitioned in (False, True):
            made = objective(1, sharded)
            if dist.get_rank() and partitioned:
                made.get_parameter("terms.nitp.down").ds_id = 0  # type: ignore[attr-defined]
            elif dist.get_rank():
                made.to("meta")
            error = raised(sidecar.save, made, folder)
            if dist.get_rank():
                assert isinstance(error, NotImplementedError if partitioned else ValueError), error
            else:
                kind = "NotImplementedError" if partitioned else "ValueError"
                assert str(error).startswith(f"save: rank 1 failed: {kind}: save: terms.nitp."), (
                    error
                )
            assert not list(folder.iterdir())


def one_rank_has_no_sidecar() -> None:
    own = Path(tempfile.mkdtemp())
    for sharded in (False, True):
        made = objective(1, sharded)
        folder = folder_for_both()
        sidecar.save(objective(2), folder)
        error = raised(sidecar.load, made, own if dist.get_rank() else folder)
        if dist.get_rank():
            assert isinstance(error, FileNotFoundError), error
        else:
            assert str(error).startswith("load: rank 1 failed: FileNotFoundError: load: "), error
        assert values(made) == {1.0}


def ranks_read_different_sidecars() -> None:
    folders = folder_for_both(), folder_for_both()
    for value, folder in enumerate(folders):
        sidecar.save(objective(value), folder)
    made = objective(9)
    error = raised(sidecar.load, made, folders[dist.get_rank()])
    assert f"load: rank {1 - dist.get_rank()} read other content" in str(error), error
    assert values(made) == {9.0}


def what_is_whole_is_loaded() -> None:
    folder = folder_for_both()
    sidecar.save(objective(3, sharded=True), folder)
    for sharded in (False, True):
        made = objective(0, sharded)
        sidecar.load(made, folder)
        assert values(made) == {3.0}


CASES = {
    case.__name__: case
    for case in (
        rank_zero_can_not_write,
        one_rank_has_no_values_to_save,
        one_rank_has_no_sidecar,
        ranks_read_different_sidecars,
        what_is_whole_is_loaded,
    )
}
