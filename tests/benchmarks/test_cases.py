"""`benchmarks`: real heads, what each case must do, peers that say why they cannot run, cases that
do not fit."""

import sys

import pytest
import torch

import nitp_ops
from benchmarks import __main__ as command
from benchmarks import peers
from benchmarks.cases import OPS, heading
from benchmarks.implementations import NAMES, SLOW, forward, names_for, step
from benchmarks.measure import cpu, process_memory
from benchmarks.model_shapes import HEADS
from benchmarks.suites import cpu_run

pytestmark = pytest.mark.programs

CONFIGS = {"GPT-2": "GPT2Config", "Gemma-2-2B": "Gemma2Config", "DeepSeek-V3": "DeepseekV3Config"}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_head_is_that_of_the_published_configuration(name):
    import transformers

    config, head = getattr(transformers, CONFIGS[name])(), HEADS[name]
    assert (head.width, head.vocabulary) == (config.hidden_size, config.vocab_size)
    assert head.softcap == (getattr(config, "final_logit_softcapping", None) or 0)


def test_every_head_names_its_source_and_is_a_case():
    assert list(OPS["linear_cross_entropy"].full) == list(HEADS)
    for name, head in HEADS.items():
        assert head.source and name in command.listing()
    assert OPS["linear_cross_entropy"].full["Gemma-2-9B"]["softcap"] == 30


@pytest.mark.parametrize(
    ("op", "width"), [("linear_cross_entropy", "d"), ("implicit_token_loss", "d")]
)
def test_the_flops_of_a_case_are_those_that_explain_states(op, width):
    for sizes in OPS[op].full.values():
        plan = nitp_ops.explain(op, rows=sizes["N"], width=sizes[width], vocabulary=sizes.get("V"))
        assert OPS[op].flops(sizes) == plan.flops


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_the_least_bytes_are_those_of_the_inputs_and_gradients(op):
    inputs = op.inputs(op.toy, torch.float32)
    wide = [tensor for tensor in inputs.arguments.values() if tensor.is_floating_point()]
    read_and_written = sum(each.nbytes for each in wide) + sum(
        leaf.nbytes for leaf in inputs.leaves.values()
    )
    if op.name in ("swiglu", "alignment"):  # nothing stays in a cache from forward to backward
        read_and_written += sum(each.nbytes for each in wide)
        if op.name == "swiglu":  # the product, and its gradient
            read_and_written += 2 * wide[0].nbytes
    assert op.least_bytes(op.toy, torch.float32) == read_and_written
    assert heading(op, "toy", op.toy, torch.float32)["least_bytes"] == read_and_written


def test_a_softcap_reaches_everybody_that_has_one_and_the_others_say_so():
    op, sizes = OPS["linear_cross_entropy"], {"N": 6, "d": 8, "V": 20, "softcap": 1}
    capped, plain = op.inputs(sizes, torch.float32), op.inputs(op.toy, torch.float32)
    for name in ("ours", "ours-reference", "eager", "eager-float32"):
        value = step(forward(op.name, name), capped)
        assert value == pytest.approx(
            float(step(forward(op.name, "ours-reference"), capped)), rel=1e-5
        )
        assert abs(value - step(forward(op.name, name), plain)) > 1e-3
    rows = cpu.time_case(op, sizes, torch.float32, ["torch-best"], rounds=1, seconds=1.0)
    assert (
        "has no softcap" in rows["torch-best"]["skipped"]
        or "has no F.linear" in rows["torch-best"]["skipped"]
    )


def test_names_of_the_cross_entropy_alone_stay_out_of_other_ops():
    assert names_for("linear_cross_entropy") == list(NAMES)
    assert names_for("swiglu") == [
        "ours",
        "ours-compiled",
        "ours-triton",
        "ours-reference",
        "eager",
        "compile",
    ]
    assert set(SLOW) < set(NAMES)


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_that_cannot_run_prints_its_reason(name, monkeypatch):
    for module in {module for peer in peers.PEERS.values() for module in peer.modules}:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    op = OPS["linear_cross_entropy"]
    rows = cpu.time_case(op, op.toy, torch.float32, ["ours", name], rounds=1, seconds=1.0)
    assert "Error: " in rows[name]["skipped"] and "milliseconds" in rows["ours"]


def test_forward_and_backward_are_the_two_parts_of_a_step():
    op = OPS["swiglu"]
    now = 0.0

    def clock() -> float:
        return now

    def slow(gate, up):
        nonlocal now
        now += 3.0
        return gate * up

    taken = cpu.Step(slow, op.inputs(op.toy, torch.float32), clock)
    taken()
    rows = {"floor": {}, "ours": {}}
    cpu.described(rows, {"floor": [1.0], "ours": [5.0]}, {"ours": taken}, flops=10**9)
    assert (
        rows["ours"]["forward_ms"]["median"] == 3000
        and rows["ours"]["backward_ms"]["median"] == 2000
    )
    assert rows["ours"]["gflop_per_s"] == pytest.approx(0.2)


def test_a_case_that_does_not_fit_is_a_reason_and_no_swap(monkeypatch):
    monkeypatch.setattr(process_memory, "available_bytes", lambda: 2**30)
    monkeypatch.setattr(cpu_run, "in_child", lambda *_: pytest.fail("measured"))
    op = OPS["linear_cross_entropy"]
    (case,) = cpu_run.measure_case(
        op,
        "DeepSeek-V3",
        op.full["DeepSeek-V3"],
        "bfloat16",
        ["ours"],
        1,
        ["default"],
        cpu_run.QUICK,
    )
    assert case["rows"]["ours"]["skipped"].endswith("GiB, 1.0 are available")


def test_a_name_and_an_op_that_do_not_meet_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(cpu_run.gate, "refused", lambda ops: pytest.fail("ran the tests"))
    assert command.main(["--op", "swiglu", "--case", "GPT-2"]) == 2
    assert "see --list" in capsys.readouterr().err


def test_an_extra_case_is_its_module(monkeypatch):
    seen = []
    monkeypatch.setitem(command.EXTRA, "scaling", "gate")
    monkeypatch.setattr(
        cpu_run.gate, "run", lambda options: seen.append(options.case) or 7, raising=False
    )
    assert command.main(["--case", "scaling"]) == 7 and seen == [["scaling"]]
