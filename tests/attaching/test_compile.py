"""attach before compile is traced whole; after it, it is refused."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import nitp_ops
from nitp_ops.attaching import handle_of
from tests.support.hugging_face_cases import batch, gradients, make

pytestmark = pytest.mark.trainers


def test_one_graph_holds_the_model_and_the_objective_and_serves_every_batch():
    model, given = make("llama", num_hidden_layers=2), batch()
    handle = nitp_ops.attach(model, "ntp + schedule(to=0.8, warmup=4)*nitp(target_layer=1)")
    handle.set_step(2)
    expected = model(**given).loss
    reference = gradients(expected, model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(**given)
    assert out.logits is None and handle_of(compiled) is handle  # type: ignore[arg-type]
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    for name, value in gradients(out.loss, model).items():
        torch.testing.assert_close(value, reference[name], rtol=1e-10, atol=1e-12)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    other = batch(seed=7)
    handle.set_step(3)
    torch.testing.assert_close(compiled(**other).loss, model(**other).loss, rtol=1e-12, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, (
        "another batch or step compiles again"
    )


def test_a_graph_may_break_at_an_engines_hooks():
    """As it does at those of FSDP2, on every module; a head's are run around the objective's
    reading of it."""
    model, given, calls = make("llama", num_hidden_layers=2), batch(), []

    @torch.compiler.disable
    def engine(*_: object) -> None:
        calls.append(None)

    engine.__module__ = "torch.distributed.fsdp"
    nitp_ops.attach(model, "ntp + 0.8*nitp(target_layer=1)")
    for module in (model, model.model.layers[0], model.lm_head):
        module.register_forward_pre_hook(engine)
    expected = model(**given).loss
    assert len(calls) == 3
    torch.compiler.reset()
    torch.testing.assert_close(
        torch.compile(model, backend="eager")(**given).loss, expected, rtol=1e-12, atol=0
    )
    assert len(calls) == 6


def test_a_compiled_model_is_refused_in_every_form():
    refused = pytest.raises(
        ValueError,
        match=r"model is compiled \(\w+\), expected attach before "
        r"compile",
    )
    with refused:
        nitp_ops.attach(torch.compile(make("llama")), "ntp")
    model = make("llama")
    model.compile()
    with refused:
        nitp_ops.attach(model, "ntp")
    model = make("llama")
    model.model.layers[1].compile()
    with refused:
        nitp_ops.attach(model, "ntp")
