"""`benchmarks.measure`: fair rounds, processes of their own, true peak memory."""

import os
from collections.abc import Callable

import pytest
import torch

from benchmarks.cases import OPS
from benchmarks.measure import children, cpu, isolated, process_memory, timing

pytestmark = pytest.mark.programs


def interleaved(
    durations: dict[str, float], rounds: int, seconds: float
) -> tuple[dict[str, list[float]], str]:
    now, order = 0.0, ""

    def run(name: str) -> Callable[[], None]:
        def call() -> None:
            nonlocal now, order
            now, order = now + durations[name], order + name

        return call

    runs = {name: run(name) for name in durations}
    times = timing.interleave(runs, lambda: None, rounds=rounds, seconds=seconds, clock=lambda: now)
    return times, order


def test_every_round_starts_with_another_implementation_and_every_second_one_goes_backwards():
    times, order = interleaved({"a": 1.0, "b": 2.0, "c": 4.0}, rounds=4, seconds=99)
    assert order == "abc" + "bac" + "cab" + "acb"
    assert times == {"a": [1.0] * 4, "b": [2.0] * 4, "c": [4.0] * 4}


def test_a_slow_implementation_leaves_the_rounds_with_at_least_one_time():
    times, _ = interleaved({"a": 1.0, "b": 50.0}, rounds=5, seconds=10)
    assert times == {"a": [1.0] * 5, "b": [50.0]}


def test_preparing_a_run_is_not_timed():
    now = 0.0

    def prepare() -> None:
        nonlocal now
        now += 5.0

    assert timing.interleave({"a": int}, prepare, rounds=3, seconds=99, clock=lambda: now) == {
        "a": [0.0] * 3
    }


def test_ratios_within_a_round_cancel_a_drift_of_the_machine():
    drift = [1.0, 2.0, 4.0, 8.0]
    ratio = timing.ratios([3 * each for each in drift], drift)
    assert ratio == {"median": 3.0, "q25": 3.0, "q75": 3.0}


def test_the_spread_is_the_median_and_the_quartiles():
    assert timing.quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "q25": 2.0, "q75": 4.0}
    assert timing.quartiles([7.0]) == {"median": 7.0, "q25": 7.0, "q75": 7.0}


def test_a_child_returns_its_result_and_leaves_the_parent_unchanged():
    seen = []
    assert children.in_child(lambda: (seen.append(1), os.getpid())[1]) != os.getpid() and not seen


def test_a_failing_or_dying_child_is_one_line():
    def fail() -> None:
        raise ValueError("no such thing\nand a second line")

    with pytest.raises(isolated.MeasurementError, match=r"^ValueError: no such thing$"):
        children.in_child(fail)
    with pytest.raises(isolated.MeasurementError, match="ended with code 3"):
        children.in_child(lambda: os._exit(3))


def test_peak_memory_counts_what_a_step_holds_at_its_peak(monkeypatch):
    op, mebibyte = OPS["swiglu"], 2**20

    def hungry(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        held = torch.ones(48 * mebibyte // 4)
        return gate * up * held[0]

    monkeypatch.setattr(cpu, "forward", lambda *_: hungry)

    def task() -> dict[str, int]:
        # One thread: a pool that this process may have started does not survive a fork.
        children.configure(threads=1)
        return cpu.peak_memory(op, op.toy, torch.float32, "ours")

    memory = children.in_child(task)
    # The kernel counts resident pages to about 0.25 MiB here.
    assert 47 * mebibyte <= memory["peak_bytes"] < 56 * mebibyte
    assert memory["gradient_bytes"] == 2 * 4 * op.toy["N"] * op.toy["m"]


@pytest.mark.parametrize(("malloc", "kept"), [("default", False), ("raised", True)])
def test_raised_malloc_keeps_a_freed_block_and_the_default_gives_it_back(malloc, kept):
    def task() -> int:
        children.configure(1, malloc)
        before = process_memory.resident_bytes("VmRSS")
        torch.ones(2**24)
        return process_memory.resident_bytes("VmRSS") - before

    assert (children.in_child(task) > 2**25) is kept
