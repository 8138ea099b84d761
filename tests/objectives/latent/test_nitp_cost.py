"""What NITP costs: the paper's FLOPs, counted on the equations, planned by the op and stated by the
objective."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import nitp_ops
from nitp_ops import reference
from nitp_ops.objectives import ModelInfo, build
from tests.support.nitp_cases import matrices, normal

aten = torch.ops.aten
GEMMS = {aten.mm, aten.addmm, aten.bmm}


class RowWork(TorchDispatchMode):
    """Counts the numbers that operations other than GEMMs write; views write none."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if (
            isinstance(result, torch.Tensor)
            and not func.is_view
            and func.overloadpacket not in GEMMS
        ):
            self.written += result.numel()
        return result


def train(rows: int, width: int, kind: str = "swiglu", inner: int | None = None) -> None:
    """Forward and backward of the equations at `rows` pairs, with a gradient for every input."""
    hidden, target = normal(0, 1, rows, width).requires_grad_(), normal(1, 1, rows, width)
    weights = matrices(kind, 2, width, width, 4 * width if inner is None else inner)
    gate, up, down = weights if kind == "swiglu" else (None, None, weights[0])
    reference.implicit_token_loss(hidden, target, gate, up, down, shift=0).backward()


def counted(*arguments: object) -> int:
    with FlopCounterMode(display=False) as counter:
        train(*arguments)  # type: ignore[arg-type]
    return counter.get_total_flops()


@pytest.mark.parametrize("width", [8, 24, 40])
@pytest.mark.parametrize("rows", [1, 7])
def test_the_swiglu_projector_takes_72_d_squared_flops_a_token(rows, width):
    """Three GEMMs of ``4 d^2`` multiply-adds forward, twice as many backward: ``2 * 12 d^2 * 3 =
    72 d^2``, exactly; the plan of the op says the same number."""
    assert counted(rows, width) == rows * 72 * width**2
    assert (
        nitp_ops.explain("implicit_token_loss", rows=rows, width=width).flops
        == rows * 72 * width**2
    )


def test_the_rest_is_linear_in_the_width():
    """``72 d^2 + O(d)``: what the rows between the GEMMs write grows by equal steps with d, with
    no square in it."""
    written = []
    for width in (8, 16, 24, 32):
        one, many = RowWork(), RowWork()
        for mode, rows in ((one, 5), (many, 25)):
            with mode:
                train(rows, width)
        written.append((many.written - one.written) / 20)  # a token's share
    steps = [b - a for a, b in itertools.pairwise(written)]
    assert steps[0] == steps[1] == steps[2] > 0


@pytest.mark.parametrize(("kind", "inner"), [("swiglu", 20), ("linear", None)])
def test_other_projectors_take_six_flops_a_parameter_and_token(kind, inner):
    """``6 (2 d m + m d)`` for swiglu of inner width m, ``6 d^2`` for the linear ablation."""
    width, rows = 16, 5
    parameters = 3 * 20 * width if kind == "swiglu" else width**2
    assert counted(rows, width, kind, inner) == rows * 6 * parameters
    info = ModelInfo(hidden_size=width, vocab_size=7, num_layers=3)
    options = f"projector={kind}" + (f", intermediate_size={inner}" if inner else "")
    assert (
        f"{6 * parameters + 18 * width:,} ({6 * parameters / width**2:g} d^2 + 18 d)"
        in build(f"nitp({options})", model=info).explain()
    )


def test_the_paper_s_overhead_of_2_3_per_cent_follows_from_its_shape():
    """``72 d^2 / (L (18 d^2 + 18 k d d_e) + 6 V d)``: 1.18e8 over 5.06e9 FLOPs per token = 2.3 % at
    the 9B model."""
    d, d_e, k, layers, vocabulary = 1280, 640, 9, 24, 152064
    added = nitp_ops.explain("implicit_token_loss", rows=1, width=d).flops
    model = layers * (18 * d**2 + 18 * k * d * d_e) + 6 * vocabulary * d
    assert (added, model) == (117_964_800, 5_060_689_920)
    assert (f"{added:.2e}", f"{model:.2e}", f"{added / model:.1%}") == (
        "1.18e+08",
        "5.06e+09",
        "2.3%",
    )
    info = ModelInfo(hidden_size=d, vocab_size=vocabulary, num_layers=layers)
    with torch.device("meta"):
        stated = build("ntp + 0.8*nitp(target_layer=5)", model=info).explain()
    assert f"{added + 18 * d:,} (72 d^2 + 18 d)" in stated and f"{12 * d * d:,} (12 d^2)" in stated


@pytest.mark.parametrize("shape", [(64, 256, 4), (896, 151936, 24), (4096, 128256, 32)])
def test_a_dense_model_pays_one_part_in_its_depth_plus_its_head(shape):
    """At ``12 d^2`` parameters a layer: ``72 d^2 / (6 (12 d^2 L + V d)) = 1 / (L + V / (12 d))``."""
    d, vocabulary, layers = shape
    head = nitp_ops.explain("linear_cross_entropy", rows=1, width=d, vocabulary=vocabulary).flops
    added = nitp_ops.explain("implicit_token_loss", rows=1, width=d).flops
    blocks = 6 * 12 * d**2 * layers
    assert added / (blocks + head) == pytest.approx(1 / (layers + vocabulary / (12 * d)), rel=1e-12)
