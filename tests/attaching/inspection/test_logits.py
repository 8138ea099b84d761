"""What stands between the hidden states and the logits and changes after attach: in training no
logits show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils.flop_counter import FlopCounterMode

import nitp_ops
from tests.support.hugging_face_cases import batch, make

pytestmark = pytest.mark.trainers


class HalfLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


class HalfCall(nn.Linear):
    def __call__(self, *args: Any) -> Tensor:
        return super().__call__(*args) / 2


def replaced_forward(model: Any) -> None:
    plain = model.lm_head.forward
    model.lm_head.forward = lambda hidden: plain(hidden) / 2


def replaced_class(model: Any) -> None:
    model.lm_head.__class__ = HalfLinear


def replaced_call(model: Any) -> None:
    model.lm_head.__class__ = HalfCall


def replaced_head(model: Any) -> None:
    model.set_output_embeddings(HalfLinear(32, 64, bias=False, dtype=torch.float64))


def another_softcap(model: Any) -> None:
    model.config.final_logit_softcapping = 30.0


def no_softcap(model: Any) -> None:
    model.config.final_logit_softcapping = None


def another_scale(model: Any) -> None:
    model.logit_scale = 1.0


def another_divisor(model: Any) -> None:
    model.config.logits_scaling = 2.0


def integer_weight(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(
        model.lm_head.weight.data.to(torch.int8), requires_grad=False
    )


def compiled_head(model: Any) -> None:
    model.lm_head = torch.compile(model.lm_head)


UNDO = "expected a plain linear as at attach: undo that change"
AGAIN = r"expected attach after that change \(handle\.detach\(\) first\)"
CHANGES: dict[Callable[[Any], None], tuple[str, str]] = {
    replaced_forward: ("gemma2", rf"head had its forward replaced by \S*<lambda>, {UNDO}"),
    replaced_class: ("gemma2", rf"head is a \S*HalfLinear, {UNDO}"),
    replaced_call: ("gemma2", rf"head is a \S*HalfCall, {UNDO}"),
    replaced_head: ("gemma2", rf"head is a \S*HalfLinear, {UNDO}"),
    integer_weight: (
        "llama",
        r"head has a weight of torch\.int8, expected a plain floating point "
        r"tensor as at attach",
    ),
    compiled_head: (
        "llama",
        r"head is a OptimizedModule with submodules _orig_mod, .*compile the "
        r"model, not its head",
    ),
    another_softcap: (
        "gemma2",
        r"config\.final_logit_softcapping changed after attach, the logits' softcap 5\.0, "
        r"logit_scale 1 became "
        rf"softcap 30\.0, logit_scale 1, {AGAIN}",
    ),
    no_softcap: (
        "gemma2",
        r"config\.final_logit_softcapping changed .* became softcap None, "
        rf"logit_scale 1, {AGAIN}",
    ),
    another_scale: (
        "cohere",
        r"model\.logit_scale changed .* logit_scale 0\.25 became .* "
        rf"logit_scale 1, {AGAIN}",
    ),
    another_divisor: (
        "granite",
        r"config\.logits_scaling changed .* logit_scale 0\.25 became .* "
        r"logit_scale 0\.5",
    ),
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_the_logits_is_refused_before_anything_is_computed(
    change: Callable[[Any], None],
):
    family, message = CHANGES[change]
    model, given, ran = make(family), batch(), []
    nitp_ops.attach(model, "ntp")
    model(**given)
    change(model)
    model.model.embed_tokens.register_forward_hook(lambda *_: ran.append(1))
    for _ in range(2):  # what was refused once stays refused
        with pytest.raises(ValueError, match=f"^attach: .*{message}"):
            model(**given)
    assert not ran


@pytest.mark.parametrize(
    "change", [replaced_forward, no_softcap], ids=lambda change: change.__name__
)
def test_a_change_before_the_first_compiled_step_is_refused(change: Callable[[Any], None]):
    model = make("gemma2", num_hidden_layers=1)
    nitp_ops.attach(model, "ntp")
    change(model)
    with pytest.raises(Exception, match=CHANGES[change][1]):
        torch.compile(model, backend="eager", fullgraph=True)(**batch())


def test_other_settings_may_change_and_the_softcap_is_seen_after_them():
    model, given = make("gemma2"), batch()
    nitp_ops.attach(model, "ntp")
    expected = model(**given).loss
    model.config.use_cache, model.config.pad_token_id, model.anything = False, 5, 1.5
    model.bfloat16().double()
    model(**given)
    assert expected.isfinite()
    no_softcap(model)
    with pytest.raises(ValueError, match=CHANGES[no_softcap][1]):
        model(**given)


def halve(module: nn.Module, args: Any, output: Any) -> Any:
    return output / 2 if isinstance(module, nn.Linear) and output.shape[-1] == 64 else None


def halve_input(module: nn.Module, args: Any) -> Any:
    return (args[0] / 2,) if isinstance(module, nn.Linear) and module.out_features == 64 else None


def watch_gradient(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
    pass


GLOBAL: dict[str, tuple[Any, Any]] = {
    "forward hook": (nn_module.register_module_forward_hook, halve),
    "forward pre-hook": (nn_module.register_module_forward_pre_hook, halve_input),
    "backward hook": (nn_module.register_module_full_backward_hook, watch_gradient),
}


@pytest.fixture(params=GLOBAL)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
    for hooks in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks"):
        getattr(nn_module, hooks).clear()
    nn_module._global_is_full_backward_hook = None


def test_a_hook_on_every_module_is_refused_by_name_at_attach_and_at_the_first_step(kind: str):
    register, hook = GLOBAL[kind]
    model, given = make("llama"), batch()
    message = rf"attach: the model's head has a global {kind} \S*{hook.__name__}, expected none"
    registered = register(hook)
    with pytest.raises(ValueError, match=message):
        nitp_ops.attach(model, "ntp")
    registered.remove()
    nitp_ops.attach(model, "ntp")
    model(**given)
    register(hook)
    with pytest.raises(ValueError, match=message):
        model(**given)


def test_a_step_can_be_counted_by_the_flop_counter_of_torch():
    """Its hooks are on every module, and watch."""
    model, given = make("llama"), batch()
    nitp_ops.attach(model, "ntp + 0.8*nitp(target_layer=1)")
    expected = model(**given).loss
    with FlopCounterMode(display=False) as counter:
        loss = model(**given).loss
        loss.backward()
    assert torch.equal(loss, expected) and counter.get_total_flops() > 0
