"""Counts that no model and no sequence can use are refused before anything of their size is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nitp_ops.engine.reports.cost_model import Mesh
from nitp_ops.engine.streams.context_parallel import SequenceShard
from nitp_ops.objectives import ModelInfo, SpecError, Streams, build, schedule

INFO = ModelInfo(hidden_size=4, vocab_size=8, num_layers=2)

DISTINCT = "expected distinct integers in [1, 1048576]"
WIDE = "intermediate_size is 1000000000, expected at most 1024 (256 hidden_size)"


def refused(spec: Any) -> str:
    with pytest.raises(SpecError) as caught:
        build(spec, model=INFO)
    (line,) = caught.value.problems
    return line


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mtp_sequential(depth=1000000000)", "depth is 1000000000, expected an integer in [1, 64]"),
        ({"mtp_parallel": {"offsets": list(range(1, 66))}}, "offsets holds 65 integers, expected "
                                                            "at most 64"),
        ({"mtp_shared": {"offsets": list(range(1, 258))}}, "offsets holds 257 integers, expected "
                                                           "at most 256"),
        ("mtp_shared(offsets=[1, 1000000000])", f"offsets is [1, 1000000000], {DISTINCT}"),
        ("mtp_parallel(offsets=[1000000000])", f"offsets is [1000000000], {DISTINCT}"),
        ("top(window=1000000000)", "window is 1000000000, expected an integer in [1, 1048576]"),
        ("fsp_bow(tau=1000000000)", "tau is 1000000000, expected an integer in [2, 1048576]"),
        ("nitp(shift=1000000000)", "shift is 1000000000, expected an integer in [0, 1048576]"),
        ("next_embedding(shift=1000000000)", "shift is 1000000000, expected an integer in [0, "
                                             "1048576]"),
        ("nitp(intermediate_size=1000000000)", WIDE),
        ("nextlat(intermediate_size=1000000000)", WIDE),
    ],
    ids=str,
)  # fmt: skip
def test_a_count_that_nothing_can_use_is_refused(spec: Any, message: str):
    assert refused(spec).partition(": ")[2] == message


@pytest.mark.parametrize(
    "spec",
    ["mtp_shared(offsets=[1048576])", "mtp_parallel(offsets=[1048576], "
                                      "heads=residual)", "top(window=1048576)",
     "fsp_bow(tau=1048576)", "nitp(shift=1048576)"],
)  # fmt: skip
def test_the_largest_count_makes_nothing_of_its_size(spec: str):
    """At the ends of the ranges: 6 tokens have no more targets than a few tokens ahead."""
    ids = torch.randint(8, (2, 6), generator=torch.Generator().manual_seed(0))
    hidden, head = torch.ones(2, 6, 4), torch.zeros(8, 4)
    objective = build(spec, model=INFO)
    states = {0: hidden, 1: hidden}
    streams = Streams(
        token_ids=ids, last_hidden=hidden, hidden_states=states, head=head, embed=head
    )
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch(), torch.no_grad():
        assert objective(streams).loss.isfinite()
    assert 0 < largest < 10_000


HUGE = 2**63
IDS = torch.zeros(1, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build({"mtp_shared": {"offsets": [2, HUGE]}}, model=INFO), "a list of integers "
                                                                            "of 64 bits"),
        (lambda: build({"mtp_sequential": {"depth": HUGE}}, model=INFO), "depth is 9.*, expected "
                                                                         "an integer of 64"),
        (lambda: build({"nitp": {"target_layer": -HUGE - 1}}, model=INFO), "an integer or a "
                                                                           "number of 64 bits"),
        (lambda: build({"ntp": {"weight": 10**30}}, model=INFO), "weight is 1.*, expected a "
                                                                 "number of 64 bits"),
        (lambda: build({"ntp": {"z_loss": HUGE}}, model=INFO), "z_loss is 9.*, expected a number "
                                                               "of 64 bits"),
        (lambda: schedule(to=1, begin=HUGE), "begin is 9.*, expected an integer of 64 bits"),
        (lambda: schedule([[HUGE, 1]]), r"points holds \[9.*, 1\], expected .* of 64 bits"),
        (lambda: ModelInfo(hidden_size=HUGE, vocab_size=8, num_layers=2), "is 9.*, expected an "
                                                                          "integer of 64 bits"),
        (lambda: Streams(token_ids=IDS, ignore_index=HUGE), "ignore_index is 9.*, expected an "
                                                            "integer of 64 bits"),
        (lambda: SequenceShard(length=HUGE), "length is 9.*, expected an integer of 64 bits"),
        (lambda: Mesh(tp=HUGE), "tp is 9.*, expected an integer of 64 bits >= 1"),
        (
            lambda: build("schedule(to=1)*ntp", model=INFO)(
                Streams(token_ids=IDS, last_hidden=torch.ones(1, 3, 4), head=torch.ones(8, 4)), step=HUGE
            ),
            "step is 9.*, expected an integer of 64 bits >= 0",
        ),
    ],
)  # fmt: skip
def test_an_integer_that_64_bits_do_not_hold_is_told_so(call: Any, message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
