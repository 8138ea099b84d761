"""How rows are laid out over blocks, and what a launch asks of the driver, on the emulated device."""

import ctypes

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.cuda_source.build_for_cpu import choose, simt

pytestmark = pytest.mark.gpu_source

WIDTHS = (2, 4, 8)
PACKS_OF_THREAD, MOST = 2, 256


def tiles(columns, width):
    out = (ctypes.c_int64 * 2)()
    simt().simt_tiles(ctypes.c_int64(columns), ctypes.c_int64(width), out)
    return tuple(out)


@given(st.integers(1, 2**40) | st.integers(1, 50000), st.sampled_from(WIDTHS))
def test_tiles_cover_a_row_and_leave_at_most_a_warp_each_idle(columns, width):
    of_row, threads = tiles(columns, width)
    packs, of_tile = -(-columns // width), threads * PACKS_OF_THREAD
    assert threads % 32 == 0 and 32 <= threads <= MOST
    assert of_row * of_tile >= packs
    assert of_row == -(-packs // (MOST * PACKS_OF_THREAD))  # no more tiles than full blocks need
    assert of_row * of_tile - packs < of_row * 32 * PACKS_OF_THREAD


@pytest.mark.parametrize(
    ("columns", "geometry"),
    [
        (5120, (2, 160)),
        (2048, (1, 128)),
        (4096, (1, 256)),
        (8192, (2, 256)),
        (11008, (3, 256)),
        (1, (1, 32)),
        (0, (0, 32)),
    ],
)
def test_tiles_of_common_widths_in_half_precision(columns, geometry):
    assert tiles(columns, 8) == geometry


def launch(columns=300, softcap=0.0):
    stats, picked, best = torch.empty(2, 1), torch.empty(1, 1), torch.empty(1, dtype=torch.int64)
    arguments = torch.randn(1, columns).bfloat16(), torch.zeros(1, 1).long(), None, None, None, None
    torch.ops.nitp_simt.cross_entropy_rows_(
        *arguments, stats, picked, best, -100, False, 0.0, 0.0, softcap, 1.0, True
    )


def test_a_launch_asks_what_a_device_has_once_per_device_kernel_and_width():
    questions = simt().simt_questions

    def asked(*arguments):
        before = questions()
        launch(*arguments)
        return questions() - before

    choose(shared_bytes=8192, cluster=8, threads=128)
    first = asked(8200)
    assert first > 1 and asked(8200) == 0
    assert asked(8200, 30.0) == first and asked(8200, 30.0) == 0  # another kernel
    assert asked(300) > 0 and asked(300) == 0
    choose(shared_bytes=8192, cluster=4, threads=128)
    assert asked(8200) > 0 and asked(8200) == 0
    choose()
