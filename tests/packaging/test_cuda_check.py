"""What `make cuda-check` reads from machine code: the shortest turn of each innermost loop over
packs."""

import importlib
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "csrc/tools"


def module(name, monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


#: A loop over two packs with a branch that most turns take, inside another loop.
CODE = """
MOV R1, c[0x0][0x28]
LDG.E.128.CONSTANT R4, desc[UR6][R2.64]
LDS.128 R8, [R3+0x100]
FSETP.GT.AND P0, PT, R4, R5, PT
@!P0 BRA 0x70
MUFU.EX2 R5, R5
FMUL R6, R6, R5
FADD R6, R6, R4
@P1 BRA 0x10
STG.E.128 desc[UR6][R2.64], R4
@!P2 BRA 0x90
@P3 BRA 0x0
EXIT
"""


def listed(code):
    return [(16 * i, line) for i, line in enumerate(code.strip().splitlines())]


def test_the_shortest_turn_of_each_innermost_loop(monkeypatch):
    sass = module("sass", monkeypatch)
    adds, writes = sass.loops(listed(CODE))
    assert adds == (6, 2, 0) and writes == (2, 0, 1)
    assert adds.of_each(2) == 6 / 16 and writes.of_each(4) == 2 / 4


def test_an_unconditional_jump_leaves_out_what_follows(monkeypatch):
    code = CODE.replace("@!P0 BRA 0x70", "BRA 0x70").replace("MUFU.EX2 R5, R5", "@P0 BRA 0x10")
    assert module("sass", monkeypatch).loops(listed(code))[0].instructions == 6


def test_a_kernel_is_measured_by_the_loops_that_take_most_packs(monkeypatch):
    sass, check = module("sass", monkeypatch), None
    module("build_cuda", monkeypatch)
    check = module("cuda_check", monkeypatch)
    loops = [
        sass.Loop(99, 1, 0),
        sass.Loop(64, 2, 0),
        sass.Loop(80, 2, 0),
        sass.Loop(24, 1, 1),
        sass.Loop(3, 0, 1),
    ]
    name = "cross_entropy_rows<Cluster, float, float, 0>"
    assert check.rate(name, loops) == (name, 10, 6)
    assert check.rate(name.replace("float, float", "bfloat16, float"), loops) == (
        name.replace("float, float", "bfloat16, float"),
        5,
        3,
    )


@pytest.mark.parametrize("nvcc", [None])
def test_without_nvcc_nothing_is_checked_and_that_is_said(nvcc, monkeypatch, capsys):
    module("sass", monkeypatch)
    build = module("build_cuda", monkeypatch)
    check = module("cuda_check", monkeypatch)
    monkeypatch.setattr(build, "find_nvcc", lambda: nvcc)
    assert check.main() == 0 and "skipped, no nvcc" in capsys.readouterr().out
