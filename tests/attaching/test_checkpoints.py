"""What is saved: the plain model here, the objective's own parameters there; and adapters."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from safetensors import safe_open

import nitp_ops
from nitp_ops.attaching import handle_of
from tests.support.hugging_face_cases import assert_equal_training, batch, gradients, make

pytestmark = pytest.mark.trainers
SPEC = "ntp + 0.8*nitp(target_layer=1)"


def own(handle: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in handle.objective.state_dict().items()}


@pytest.mark.parametrize("tied", [True, False])
def test_save_pretrained_writes_the_plain_model_and_it_loads(tmp_path: Path, tied: bool):
    from transformers import LlamaForCausalLM

    model, given = make("llama", dtype=torch.float32, tie_word_embeddings=tied), batch()
    names = set(model.state_dict())
    nitp_ops.attach(model, SPEC)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        written = set(file.keys())
    assert written == names - ({"lm_head.weight"} if tied else set())
    loaded, report = LlamaForCausalLM.from_pretrained(  # type: ignore[misc]
        tmp_path, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not report["unexpected_keys"] and not report["missing_keys"]
    assert torch.equal(loaded.eval()(**given).logits, model.eval()(**given).logits)
    # engines hand over a state dict that they gathered themselves, parameter by parameter
    model.save_pretrained(
        tmp_path / "gathered", state_dict={n: p.detach() for n, p in model.named_parameters()}
    )
    with safe_open(tmp_path / "gathered" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == written


def test_the_state_dict_is_that_of_the_plain_model_and_loads_strictly():
    model = make("llama")
    plain = model.state_dict()
    handle = nitp_ops.attach(model, SPEC)
    before = own(handle)
    assert model.state_dict().keys() == plain.keys()
    model.load_state_dict(plain)
    assert all(torch.equal(value, before[name]) for name, value in own(handle).items())
    outer = torch.nn.ModuleDict({"inner": model})
    outer.load_state_dict(outer.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({name: value for name, value in plain.items() if "norm" not in name})


def test_a_training_run_resumes_from_model_and_sidecar(tmp_path: Path):
    model, given = make("llama", dtype=torch.float32), batch()
    handle = nitp_ops.attach(model, SPEC)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    handle.check(optimizer)

    def steps(model: Any, optimizer: torch.optim.Optimizer, count: int) -> torch.Tensor:
        for _ in range(count):
            optimizer.zero_grad()
            loss = model(**given).loss
            loss.backward()
            optimizer.step()
        return loss.detach()

    steps(model, optimizer, 2)
    state, memory = {n: v.clone() for n, v in model.state_dict().items()}, io.BytesIO()
    torch.save(optimizer.state_dict(), memory)
    assert handle.save(tmp_path / "new").name == "nitp_objective.safetensors"
    expected = steps(model, optimizer, 2)

    again = make("llama", dtype=torch.float32)
    resumed = nitp_ops.attach(again, SPEC, seed=99)
    again.load_state_dict(state)
    resumed.load(tmp_path / "new")
    other = torch.optim.AdamW(again.parameters(), lr=1e-2)
    memory.seek(0)
    other.load_state_dict(torch.load(memory))
    assert torch.equal(steps(again, other, 2), expected)


def test_a_sidecar_that_is_missing_or_another_ones_is_an_error(tmp_path: Path):
    handle = nitp_ops.attach(make("llama"), SPEC)
    with pytest.raises(
        FileNotFoundError,
        match=r"nitp_objective\.safetensors does not exist, "
        r"expected the sidecar",
    ):
        handle.load(tmp_path)
    handle.save(tmp_path)
    other = nitp_ops.attach(make("llama"), "ntp + 0.7*nitp(target_layer=1)")
    before = own(other)
    with pytest.raises(ValueError, match=r"has the spec .*0\.8.*expected .*0\.7"):
        other.load(tmp_path)
    wider = nitp_ops.attach(make("llama", hidden_size=64), SPEC)
    with pytest.raises(ValueError, match=r"holds .*\(256, 32\).*expected .*\(512, 64\)"):
        wider.load(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in own(other).items())
    assert not list(tmp_path.glob("*.tmp"))


def test_an_objective_without_parameters_has_an_empty_sidecar(tmp_path: Path):
    handle = nitp_ops.attach(make("llama"), "ntp")
    handle.save(tmp_path)
    handle.load(tmp_path)


def test_check_names_what_the_optimizer_does_not_hold():
    model = make("llama")
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = nitp_ops.attach(model, SPEC)
    with pytest.raises(
        ValueError,
        match=r"^check: terms\.nitp\.gate_up, terms\.nitp\.down of the "
        r"obj",
    ):
        handle.check(early)
    early.add_param_group({"params": list(handle.objective.parameters())})
    handle.check(early)
    handle.check(torch.optim.SGD(model.parameters(), lr=0.1))


def lora(model: Any, **options: Any) -> Any:
    import peft

    options = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_dropout": 0.0} | options
    return peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    )


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_a_lora_model_trains_the_formula(tmp_path: Path, saved: list[str] | None):
    model, given = lora(make("llama"), modules_to_save=saved).train(), batch()
    handle = nitp_ops.attach(model, SPEC)
    assert handle_of(model) is handle and model.nitp_objective is handle.objective
    assert_equal_training(model, given, given["attention_mask"] - 1, handle)
    found = gradients(model(**given).loss, model)
    assert any("lora_A" in name for name in found) and any("gate_up" in name for name in found)
    assert any("modules_to_save" in name for name in found) == (saved is not None)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert not any("nitp" in name for name in file.keys())  # noqa: SIM118


def test_all_linear_leaves_the_objective_alone_and_freezing_it_is_noticed():
    model = make("llama")
    handle = nitp_ops.attach(model, SPEC)
    wrapped = lora(model, target_modules="all-linear")
    assert not any("lora" in name for name, _ in handle.objective.named_parameters())
    frozen = pytest.raises(
        ValueError,
        match=r"gate_up is frozen, expected it to be trained \(PEFT freezes what it "
        r"finds",
    )
    with frozen:
        wrapped.train()(**batch())
    with frozen:
        handle.check(torch.optim.SGD(model.parameters(), lr=0.1))


def test_an_adapter_on_the_head_is_refused():
    model = lora(make("llama"), target_modules=["q_proj", "lm_head"])
    with pytest.raises(
        ValueError,
        match=r"the model's head is a Linear with submodules "
        r"base_layer, .*lora_A",
    ):
        nitp_ops.attach(model, "ntp")
    late = make("llama")
    nitp_ops.attach(late, "ntp")
    with pytest.raises(ValueError, match="head is a Linear with submodules base_layer"):
        lora(late, target_modules=["q_proj", "lm_head"]).train()(**batch())


def test_fully_shard_sees_the_objective_and_its_sidecar_gathers_it(tmp_path: Path):
    """One rank, the head in a group of its own: DTensors everywhere, numbers that must not change."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, given = make("llama"), batch()
    handle = nitp_ops.attach(model, SPEC)
    expected = model(**given).loss
    reference, values = gradients(expected, model), own(handle)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in (*model.model.layers, model.lm_head, model):
            fully_shard(module, mesh=mesh)
        loss = model(**given).loss
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        for name, value in gradients(loss, model).items():
            assert isinstance(value, DTensor)
            torch.testing.assert_close(value.full_tensor(), reference[name], rtol=1e-10, atol=1e-12)
        whole = StateDictOptions(full_state_dict=True)
        state = get_model_state_dict(model, options=whole)
        assert not any("nitp" in name for name in state)
        set_model_state_dict(model, state, options=whole)
        handle.save(tmp_path)
        with torch.no_grad():
            for parameter in handle.objective.parameters():
                parameter.zero_()
        handle.load(tmp_path)
        assert torch.equal(model(**given).loss, loss)
    finally:
        dist.destroy_process_group()
    plain = nitp_ops.attach(make("llama"), SPEC, seed=5)
    plain.load(tmp_path)
    assert all(torch.equal(value, values[name]) for name, value in own(plain).items())
