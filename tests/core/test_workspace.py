"""Blocks that an allocator maps afresh: their pages come at once."""

import mmap
from pathlib import Path

import pytest
import torch

from nitp_ops.core import chunking

STATM = Path("/proc/self/statm")


def _populates():
    """Whether this system brings pages on demand: Linux from 5.14 on."""
    try:
        mmap.mmap(-1, mmap.PAGESIZE).madvise(23)
    except (AttributeError, OSError):
        return False
    return STATM.exists()


on_linux = pytest.mark.skipif(not _populates(), reason="the system has no MADV_POPULATE_WRITE")


def resident():
    """Bytes of this process that are in memory."""
    return int(STATM.read_text().split()[1]) * mmap.PAGESIZE


def mapped(size):
    """A tensor over fresh pages that nothing has touched."""
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


@on_linux
def test_every_page_of_a_block_comes_and_no_number_changes():
    size = 64 * 2**20
    block = mapped(size)
    before = resident()
    torch.ops.nitp_ops.populate_(block[100:-100])
    assert resident() - before > 0.9 * size
    assert not block.any()
    block.fill_(7)
    torch.ops.nitp_ops.populate_(block)
    assert (block == 7).all()


@on_linux
def test_a_block_that_lacks_its_end_comes_too():
    size = 64 * 2**20
    block = mapped(size)
    block[: size // 8] = 1
    before = resident()
    torch.ops.nitp_ops.populate_(block)
    assert resident() - before > 0.8 * size


@pytest.mark.parametrize("size", [0, 1, mmap.PAGESIZE - 1, mmap.PAGESIZE, 3 * mmap.PAGESIZE + 1])
def test_blocks_of_any_size_are_taken(size):
    block = torch.ones(size, dtype=torch.uint8)
    torch.ops.nitp_ops.populate_(block)
    assert (block == 1).all()


def test_what_has_gaps_is_refused():
    with pytest.raises(RuntimeError, match="expected a contiguous CPU tensor"):
        torch.ops.nitp_ops.populate_(torch.ones(4, 4)[:, ::2])


def test_a_workspace_is_populated_where_it_is_large(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.ops.nitp_ops, "populate_", lambda block: seen.append(block.nbytes))
    for bytes_ in (32 * 2**20, 32 * 2**20 + 4):
        assert (
            chunking.workspace((bytes_ // 4,), torch.float32, torch.device("cpu")).nbytes == bytes_
        )
    assert seen == [32 * 2**20 + 4]
