"""Megatron-Core's GPTModel on the CPU, through its own loss step, against the formula."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("megatron.core")
pytest.importorskip("nitp_ops.trainers.megatron", exc_type=ImportError)
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss
from megatron.core.transformer.moe import moe_utils

from nitp_ops.objectives import Counts
from nitp_ops.trainers.megatron import attach_gpt
from tests.trainers.cases.megatron import (
    ROOT,
    SPEC,
    assert_same,
    double,
    formula,
    gradients,
    ragged_batch,
    step,
)

pytestmark = [pytest.mark.trainers, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture
def example(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples/trainers"))
    return __import__("megatron_step")


def test_loss_and_gradients_are_those_of_the_formula(example):
    model, batch = double(example), ragged_batch()
    attach_gpt(model, SPEC)
    output, _ = step(model, batch)
    expected = formula(model, batch)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=0)
    assert_same(gradients(output, model), gradients(expected, model))


@pytest.mark.parametrize("counted", [True, False])
def test_microbatches_through_its_loss_step_add_up_as_it_divides_them(example, counted):
    """Sums over microbatches over the number of tokens, under a loss scale: what
    finalize_model_grads makes of them."""
    spec = SPEC if counted else "ntp"
    model, batch = double(example, grad_scale_func=lambda loss: 8 * loss), ragged_batch()
    handle = attach_gpt(model, spec)
    whole, _ = step(model, batch)
    expected = {name: 8 * gradient for name, gradient in gradients(whole, model).items()}
    parts = [{name: value[b : b + 1] for name, value in batch.items()} for b in range(4)]
    counted_parts = [handle.count(**part) for part in parts]
    counts: Counts | None = sum(counted_parts[1:], start=counted_parts[0]) if counted else None
    total, reports, found = (
        0,
        [],
        {name: torch.zeros_like(p) for name, p in model.named_parameters()},
    )
    for part in parts:
        output, loss_func = step(model, part, counts=counts)
        loss, tokens = forward_step_calc_loss(
            model, output, loss_func, model.config, None, False, 4, reports
        )
        for name, gradient in gradients(model.config.grad_scale_func(loss), model).items():
            found[name] += gradient
        total += int(tokens)
    assert total == int(batch["loss_mask"].sum())
    assert_same({name: gradient / total for name, gradient in found.items()}, expected)
    numerator, denominator = torch.stack([report["objective"] for report in reports]).sum(0)
    assert numerator / denominator == pytest.approx(whole.item())
    assert sum(report["ntp/loss"][1] for report in reports) == total


def test_its_number_of_tokens_is_that_of_ntp_wherever_ntp_stands(example):
    model, batch = double(example), ragged_batch()
    attach_gpt(model, "0.8*nitp(target_layer=1) + ntp")
    output, loss_func = step(model, batch)
    loss, tokens, _ = loss_func(output)
    assert tokens == batch["loss_mask"].sum() and loss == output * tokens


def test_megatrons_own_ntp_is_the_objective_ntp(example):
    """Two documents a row: its own loss a token, under its own loss mask alone."""
    model, batch = double(example), ragged_batch()
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    attach_gpt(model, "ntp")
    output, loss_func = step(model, batch)
    loss, tokens, _ = loss_func(output)
    theirs = (losses * batch["loss_mask"]).sum()  # computed in float32
    torch.testing.assert_close(loss, theirs, rtol=1e-6, atol=0, check_dtype=False)
    assert tokens == batch["loss_mask"].sum()


@pytest.mark.parametrize("per_token", [True, False])
def test_the_losses_of_megatrons_routers_are_scaled_as_without_an_objective(
    example, monkeypatch, per_token
):
    """Its autoscalers divide them by what `loss_func` says: two microbatches, masks with holes, two
    documents a row."""
    # what its router asks of a machine without a GPU
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(moe_utils, "te_general_gemm", None, raising=False)
    options = {"num_moe_experts": 4, "moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1}
    options |= {"moe_router_load_balancing_type": "aux_loss", "calculate_per_token_loss": per_token}
    layer = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False, normalization="RMSNorm")
    layer.submodules.self_attention.submodules.core_attention = example.PlainAttention  # type: ignore[union-attr]
    batch, found = ragged_batch(), []
    for attached in (False, True):
        config = double(example, **options).config
        torch.manual_seed(1)
        model: Any = GPTModel(config, layer, vocab_size=256, max_sequence_length=64).double()
        if attached:
            attach_gpt(model, "ntp")
        total = 0
        for part in ({name: value[at : at + 2] for name, value in batch.items()} for at in (0, 2)):
            if attached:
                output, loss_func = step(model, part)
            else:
                output = model(part["tokens"], part["position_ids"], None, labels=part["labels"])
                mask = part["loss_mask"]

                def loss_func(losses, mask=mask):
                    return ((losses * mask).sum(), mask.sum().int(), {})

            loss, tokens = forward_step_calc_loss(
                model, output, loss_func, config, None, False, 2, []
            )
            loss.backward()
            total += int(tokens)
        found.append(
            {name: p.grad / (total if per_token else 1) for name, p in model.named_parameters()}
        )
    assert found[0]["decoder.layers.0.mlp.router.weight"].abs().max() > 0.01
    for name, expected in found[0].items():
        # Megatron computes its cross-entropy in float32
        torch.testing.assert_close(
            found[1][name], expected, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_without_training_or_labels_it_is_the_plain_model(example):
    model, batch = double(example), ragged_batch()
    arguments = (batch["tokens"], batch["position_ids"], None)
    logits, losses = model(*arguments), model(*arguments, labels=batch["labels"])
    attach_gpt(model, SPEC)
    step(model, batch)
    assert torch.equal(model(*arguments), logits)
    model.eval()
    assert torch.equal(model(*arguments, labels=batch["labels"]), losses)


def test_no_logits_are_built_and_own_parameters_are_in_its_sharded_state(example):
    model = double(example)
    attach_gpt(model, SPEC)
    seen = []
    model.output_layer.register_forward_hook(
        lambda m, i, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    step(model, ragged_batch())
    assert not any(isinstance(x, Tensor) and x.numel() >= 256 for x in seen)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    saved = model.sharded_state_dict(metadata={"dp_cp_group": group})
    own = {f"nitp_objective.{name}" for name, _ in model.nitp_objective.named_parameters()}
    assert own and own <= saved.keys()


def test_a_model_with_shared_embeddings_trains_its_one_matrix(example):
    model = double(example)
    torch.manual_seed(1)
    shared: Any = type(model)(
        model.config,
        model.transformer_layer_spec,
        256,
        64,
        share_embeddings_and_output_weights=True,
    )
    shared.double()
    attach_gpt(shared, SPEC)
    batch = ragged_batch()
    output, _ = step(shared, batch)
    assert_same(gradients(output, shared), gradients(formula(shared, batch), shared))


def test_what_can_not_work_is_named(example):
    for option, reason in {
        "mtp_num_layers": "mtp_num_layers is 2, expected None (mtp_sequential",
        "tensor_model_parallel_size": "tensor_model_parallel_size is 2, expected 1 (a rank holds "
        "a slice",
        "context_parallel_size": "context_parallel_size is 2, expected 1 (the next token",
        "pipeline_model_parallel_size": "pipeline_model_parallel_size is 2, expected 1 (the "
        "hidden states of a lower",
    }.items():
        model = double(example)
        setattr(model.config, option, 2)
        with pytest.raises(ValueError) as caught:
            attach_gpt(model, SPEC)
        assert reason in str(caught.value)
    with pytest.raises(
        ValueError,
        match=r"requires external\[balance\], expected only .*: "
        r"token_ids",
    ):
        attach_gpt(double(example), "ntp + balance: external")
    recomputed = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    with pytest.raises(ValueError, match=r'recompute_granularity is "full".* hidden_states\[1\]'):
        attach_gpt(double(example, **recomputed), "ntp + nitp(target_layer=1, stop_gradient=False)")
    with pytest.raises(
        ValueError, match="GPTModel without an objective, expected attach_gpt first"
    ):
        step(double(example), ragged_batch())
    model = double(example, calculate_per_token_loss=False)
    counts = attach_gpt(model, SPEC).count(**ragged_batch())
    with pytest.raises(ValueError, match="calculate_per_token_loss is False, expected True"):
        step(model, ragged_batch(), counts=counts)


def test_the_example_runs():
    path = ROOT / "examples/trainers/megatron_step.py"
    # a tiny model: threads would wait for each other
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(rows) == 6 and float(rows[-1][3]) < float(rows[0][3])
