"""`benchmarks.suites.training_step`: the same model and batch for every objective, one JSON record
each."""

import inspect
import json
import sys
import types

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks.suites import training_step

pytestmark = pytest.mark.trainers
TINY = {
    "tokens": 32,
    "hidden": 16,
    "layers": 3,
    "heads": 2,
    "kv_heads": 1,
    "intermediate": 32,
    "vocabulary": 96,
}


def record(objective: str, **options):
    return training_step.measure(
        "cpu", objective, steps=2, warmup=1, **{"dtype": "float32", **TINY, **options}
    )


@pytest.fixture(scope="module")
def records():
    return {objective: record(objective) for objective in ("plain", "ntp", "ntp + nitp")}


def test_a_record_is_json_and_says_what_ran(records):
    for objective, found in records.items():
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert (
            found["objective"] == objective
            and found["sizes"] == TINY
            and found["gradient_checkpointing"] is False
        )
        assert found["tokens_per_s"] == pytest.approx(32e3 / found["milliseconds"]["median"])
        assert found["peak_gib"] > 0.05 and found["rounds"] == 2  # torch alone has more resident


def test_plain_and_ntp_are_one_loss_and_nitp_adds_to_it(records):
    plain, ntp, both = records.values()
    assert ntp["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert both["ntp_loss"] == pytest.approx(plain["ntp_loss"], rel=1e-5)
    assert both["loss"] > both["ntp_loss"] + 0.1
    assert ntp["parameters"] == plain["parameters"] < both["parameters"]


@pytest.mark.parametrize("objective", ["plain", "ntp + nitp"])
def test_every_step_goes_backward_and_moves_every_weight(objective, monkeypatch):
    taken = []

    class Watched(torch.optim.AdamW):
        def step(self, closure=None):
            weights = [weight for group in self.param_groups for weight in group["params"]]
            before = [weight.detach().clone() for weight in weights]
            assert all(weight.grad is not None and weight.grad.any() for weight in weights)
            super().step(closure)
            taken.append(
                all(not torch.equal(old, new) for old, new in zip(before, weights, strict=True))
            )

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    training_step.measure("cpu", objective, steps=2, warmup=3, **{"dtype": "float32", **TINY})
    assert taken == [True] * 5


def test_checkpointing_changes_no_loss(records):
    found = record("ntp", gradient_checkpointing=True)
    assert found["gradient_checkpointing"] is True
    assert found["loss"] == pytest.approx(records["ntp"]["loss"], rel=1e-6)
    sizes = training_step.Sizes(**TINY)
    for wanted in (True, False):
        model, _ = training_step.build(torch.device("cpu"), "ntp", sizes, torch.float32, wanted)
        assert model.is_gradient_checkpointing is wanted


def test_the_sizes_are_those_of_qwen2():
    sizes = training_step.Sizes()
    model, _ = training_step.build(torch.device("meta"), "plain", sizes, torch.bfloat16, False)
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    # of Qwen/Qwen2-0.5B
    assert sum(parameter.numel() for parameter in parameters.values()) == 494_032_768
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_only_the_head_is_liger_s(monkeypatch):
    """The call of liger-kernel 0.8.5, which must also accept these arguments where it is installed."""
    seen = []

    def apply_liger_kernel_to_qwen2(
        rope=True,
        cross_entropy=False,
        fused_linear_cross_entropy=True,
        rms_norm=True,
        swiglu=True,
        model=None,
    ):
        seen.append(
            (rope, cross_entropy, fused_linear_cross_entropy, rms_norm, swiglu, model is not None)
        )

    try:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2 as real
    except ImportError:
        pass
    else:
        assert (
            inspect.getfullargspec(real).args
            == inspect.getfullargspec(apply_liger_kernel_to_qwen2).args
        )
    module = types.ModuleType("liger_kernel.transformers")
    module.__dict__["apply_liger_kernel_to_qwen2"] = apply_liger_kernel_to_qwen2
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    record("plain, liger head")
    assert seen == [(False, False, True, False, False, True)]


def test_what_is_unknown_or_missing_is_one_line(monkeypatch):
    with pytest.raises(ValueError, match="objective is 'nitpp', expected one of plain"):
        record("nitpp")
    with pytest.raises(TypeError, match="width"):
        record("plain", width=3)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.delitem(sys.modules, "liger_kernel.transformers", raising=False)
    with pytest.raises(ImportError, match="liger_kernel"):
        record("plain, liger head")
