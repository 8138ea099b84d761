"""`benchmarks.peers`: how each peer is called, what it cannot run, and that the real packages take
such calls."""

from __future__ import annotations

import importlib
import importlib.machinery
import inspect
import sys
import types
from typing import Any

import pytest
import torch

from benchmarks import peers
from benchmarks.cases import HEADS, OPS
from benchmarks.implementations import forward, step
from benchmarks.measure import cpu

OP = OPS["linear_cross_entropy"]
BF16, HOPPER = torch.bfloat16, (9, 0)


def liger(_input, weight, target, bias=None, softcap=None, accum_dtype=None, *, impl=None):
    assert (accum_dtype, impl, bias) == (torch.float32, "nvidia-triton", None)
    return loss(_input, weight, target, softcap), None, None, None


def sm90(_input, weight, target, ignore_index=-100, reduction="mean"):
    return loss(_input, weight, target)


def cce(e, c, targets, softcap=None, filter_eps: Any = "high", impl="cce"):
    assert impl == "torch_compile" and filter_eps in ("high", None)
    return loss(e, c, targets, softcap)


def quack(
    x,
    weight,
    target,
    chunk_size=4096,
    ignore_index=-100,
    reduction="mean",
    tuned=True,
    use_scaled_exp=None,
):
    assert use_scaled_exp in (True, False)
    return loss(x, weight, target)


def unsloth(
    trainer,
    hidden_states,
    lm_head_weight,
    lm_head_bias,
    labels,
    mask=None,
    shift_labels=True,
    *,
    logit_softcapping=0,
):
    assert trainer is lm_head_bias is mask is None and shift_labels is False
    assert hidden_states.shape[:2] == labels.shape == (1, hidden_states.shape[1])
    return loss(hidden_states[0], lm_head_weight, labels[0], logit_softcapping or None)


def loss(hidden, unembedding, labels, softcap=None):
    return forward("linear_cross_entropy", "eager")(hidden, unembedding, labels, softcap)


class LogProb:
    """The stand-in for TRL's autograd.Function, by its apply."""

    @staticmethod
    def apply(
        hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping,
        logit_scale,
        outputs,
    ):
        assert (bias, temperature, logit_scale, outputs) == (
            None,
            1.0,
            1.0,
            (),
        ) and chunk_size >= 1024
        logits = torch.nn.functional.linear(hidden, weight)
        if final_logit_softcapping:
            logits = final_logit_softcapping * torch.tanh(logits / final_logit_softcapping)
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0], None, None, None, None


#: Peer -> the module and the name that it calls, and what stands there in these tests.
CALLS = {
    "liger": ("liger_kernel.functional", "fused_linear_cross_entropy", liger),
    "liger-sm90": (
        "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90", "liger_fused_linear_cross_entropy_sm90", sm90
    ),
    "cce": ("cut_cross_entropy", "linear_cross_entropy", cce),
    "cce-exact": ("cut_cross_entropy", "linear_cross_entropy", cce),
    "quack-scaled-exp": ("quack.linear_cross_entropy", "chunked_linear_cross_entropy", quack),
    "quack-rows": ("quack.linear_cross_entropy", "chunked_linear_cross_entropy", quack),
    "trl": ("trl.kernels", "ChunkedLogProbFunction", LogProb),
    "unsloth": ("unsloth_zoo.fused_losses.cross_entropy_loss", "unsloth_fused_ce_loss", unsloth),
}  # fmt: skip


@pytest.fixture
def installed(monkeypatch):
    """Every peer's package, as far as it is called."""

    def module(name: str) -> types.ModuleType:
        found = sys.modules.get(name)
        if found is None or not hasattr(found, "fake"):
            found = types.ModuleType(name)
            found.__dict__.update(
                fake=True, __path__=[], __spec__=importlib.machinery.ModuleSpec(name, None)
            )
            monkeypatch.setitem(sys.modules, name, found)
            parent, _, last = name.rpartition(".")
            if parent:
                setattr(module(parent), last, found)
        return found

    for name, peer in peers.PEERS.items():
        for each in peer.modules:
            module(each)
        if name in CALLS:
            path, attribute, stands = CALLS[name]
            setattr(module(path), attribute, stands)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("name", CALLS)
def test_a_peer_is_called_as_its_signature_asks(name, softcap, installed, monkeypatch):
    monkeypatch.setattr(peers, "_asked_for", lambda *_: None)
    if softcap and not peers.PEERS[name].softcap:
        return
    sizes = OP.toy | ({"softcap": softcap} if softcap else {})
    inputs = OP.inputs(sizes, torch.float32)
    assert step(peers.forward(name), inputs) == pytest.approx(
        float(step(forward(OP.name, "eager"), inputs)), rel=1e-5
    )


@pytest.mark.parametrize("name", CALLS)
def test_the_real_package_takes_the_arguments_of_the_stand_in(name):
    """Where it is installed and imports without a GPU: liger-kernel, cut-cross-entropy and TRL do."""
    path, attribute, stands = CALLS[name]
    try:
        real = getattr(importlib.import_module(path), attribute)
    except ImportError:
        return
    if stands is LogProb:
        names = list(inspect.signature(real.forward).parameters)[1:]
        assert names == list(inspect.signature(LogProb.apply).parameters)
        return
    known = inspect.signature(real).parameters
    positional = [each.name for each in known.values() if each.kind != each.KEYWORD_ONLY]
    for place, wanted in enumerate(inspect.signature(stands).parameters.values()):
        takes_any = any(each.kind == each.VAR_KEYWORD for each in known.values())
        assert wanted.name in known or (takes_any and wanted.kind == wanted.KEYWORD_ONLY), (
            wanted.name
        )
        if wanted.default is wanted.empty:
            assert positional[place] == wanted.name


def test_trl_computes_the_loss_and_its_gradients_where_it_is_installed():
    try:
        function = peers.forward("trl")
    except ImportError:
        return
    for sizes in (OP.toy, OP.toy | {"softcap": 1}):
        inputs = OP.inputs(sizes, torch.float32)
        exact = cpu.value_and_gradients(
            forward(OP.name, "ours-reference"), inputs.to(torch.float64)
        )
        assert max(cpu.relative(cpu.value_and_gradients(function, inputs), exact).values()) < 1e-5


@pytest.mark.parametrize(
    ("name", "sizes", "dtype", "capability", "reason"),
    [
        ("liger", {}, BF16, None, "liger needs a GPU"),
        (
            "quack-rows",
            {},
            BF16,
            (8, 0),
            "quack-rows needs compute capability 9.0 or newer, got 8.0",
        ),
        ("liger-sm90", {}, BF16, (10, 0), "liger-sm90 needs compute capability 9.0, got 10.0"),
        (
            "quack-scaled-exp",
            {},
            torch.float32,
            HOPPER,
            "quack-scaled-exp takes bfloat16, got float32",
        ),
        (
            "quack-rows",
            {},
            torch.float32,
            HOPPER,
            "quack-rows takes bfloat16 or float16, got float32",
        ),
        ("quack-rows", {"softcap": 30}, BF16, HOPPER, "quack-rows has no softcap"),
        (
            "liger-sm90",
            {"V": 151936},
            BF16,
            HOPPER,
            "liger-sm90 needs V to be a multiple of 256, got 151936",
        ),
        (
            "liger-sm90",
            {"N": 100},
            BF16,
            HOPPER,
            "liger-sm90 needs N to be a multiple of 128, got 100",
        ),
        ("quack-scaled-exp", {"V": 151936}, BF16, HOPPER, None),
        ("quack-rows", {}, BF16, (10, 0), None),
        ("liger", {"softcap": 30}, torch.float32, (8, 0), None),
        ("trl", {"softcap": 30}, torch.float32, None, None),
    ],
)
def test_what_a_peer_cannot_do_is_one_line_and_imports_nothing(
    name, sizes, dtype, capability, reason, installed, monkeypatch
):
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    case: dict[str, int] = HEADS["Llama-3-8B"].sizes(4096) | sizes
    assert peers.unavailable(name, case, dtype, capability) == reason


def test_a_missing_module_is_named(monkeypatch):
    for module in ("quack", "cutlass"):
        monkeypatch.setitem(sys.modules, module, None)
    reason = peers.unavailable("quack-rows", OP.toy, BF16, HOPPER)
    assert (
        reason is not None
        and reason.startswith("quack-rows needs quack, cutlass")
        and "\n" not in reason
    )


def test_a_case_that_it_cannot_run_is_not_started(installed):
    inputs = OP.inputs(OP.toy, torch.float32)
    with pytest.raises(NotImplementedError, match="liger-sm90 needs a GPU"):
        step(peers.forward("liger-sm90"), inputs)
    assert inputs.leaves["hidden"].grad is None
