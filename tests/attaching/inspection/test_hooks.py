"""Hooks of others on the modules that an objective reads: honoured, or refused by name."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.debug_utils import DebugUnderflowOverflow

import nitp_ops
from tests.support.hugging_face_cases import batch, gradients, make

pytestmark = pytest.mark.trainers


def mask_columns(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.index_fill(-1, torch.arange(50, 64), float("-inf"))


def heat(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output / 0.7


def watch(module: nn.Module, args: Any, output: Any) -> None:
    output.sum()


def halve_input(module: nn.Module, args: Any) -> Any:
    return (args[0] / 2,)


def watch_gradient(module: nn.Module, grad_input: Any, grad_output: Any = None) -> None:
    pass


class Watcher:
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        output.sum()


HOOKS: dict[str, tuple[str, Any, str]] = {
    "masks columns": ("register_forward_hook", mask_columns, r"forward hook \S*mask_columns"),
    "a temperature": ("register_forward_hook", heat, r"forward hook \S*heat"),
    "only watches": ("register_forward_hook", watch, r"forward hook \S*watch"),
    "a partial": ("register_forward_hook", functools.partial(watch), r"forward hook \S*watch"),
    "an object": ("register_forward_hook", Watcher(), r"forward hook \S*Watcher"),
    "halves the input": (
        "register_forward_pre_hook",
        halve_input,
        r"forward pre-hook "
        r"\S*halve_input",
    ),
    "backward": ("register_full_backward_hook", watch_gradient, r"backward hook \S*watch_gradient"),
    "backward pre": (
        "register_full_backward_pre_hook",
        watch_gradient,
        r"backward pre-hook "
        r"\S*watch_gradient",
    ),
}


@pytest.mark.parametrize("case", HOOKS)
def test_a_hook_on_the_head_is_refused_by_name_at_attach_and_at_the_first_step(case: str):
    register, hook, name = HOOKS[case]
    model, given = make("llama"), batch()
    handle = getattr(model.lm_head, register)(hook)
    with pytest.raises(ValueError, match=rf"attach: the model's head has a {name}, expected none"):
        nitp_ops.attach(model, "ntp")
    assert not hasattr(model, "nitp_objective")
    handle.remove()
    nitp_ops.attach(model, "ntp")
    model(**given)
    getattr(model.lm_head, register)(hook)
    with pytest.raises(ValueError, match=rf"attach: the model's head has a {name}, expected none"):
        model(**given)
    if not register.startswith("register_full_backward"):
        model.eval()(**given)  # the plain model, on whose logits the hook works


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("spoil", ["weight_norm", "spectral_norm", "pruned", "parametrized"])
def test_a_head_whose_weight_is_computed_is_refused(spoil: str):
    model = make("llama")
    if spoil == "pruned":
        prune.l1_unstructured(model.lm_head, "weight", 0.5)
    elif spoil == "parametrized":
        torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    else:
        getattr(torch.nn.utils, spoil)(model.lm_head)
    with pytest.raises(
        ValueError,
        match=r"head has a forward pre-hook "
        r"torch\.nn\.utils|submodules parametrizations",
    ):
        nitp_ops.attach(model, "ntp")


def test_a_hook_on_the_gradient_of_the_heads_weight_runs():
    model, given = make("llama"), batch()
    nitp_ops.attach(model, "ntp")
    plain = gradients(model(**given).loss, model)["lm_head.weight"]
    model.lm_head.weight.register_hook(lambda gradient: 2 * gradient)
    torch.testing.assert_close(gradients(model(**given).loss, model)["lm_head.weight"], 2 * plain)


# no common factor, which a cosine would not notice
FACTORS = torch.linspace(0.5, 2.0, 32, dtype=torch.float64)


def scale(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output * FACTORS
    output.last_hidden_state = output.last_hidden_state * FACTORS
    return output


def scale_input(module: nn.Module, args: Any) -> Any:
    return (args[0] * FACTORS, *args[1:])


PLACES: dict[str, tuple[str, str, Any]] = {
    "embedding": ("model.embed_tokens", "register_forward_hook", scale),
    "block": ("model.layers.1", "register_forward_hook", scale),
    "into a block": ("model.layers.1", "register_forward_pre_hook", scale_input),
    "norm": ("model.norm", "register_forward_hook", scale),
    "body": ("model", "register_forward_hook", scale),
}


@pytest.mark.parametrize("after", [False, True], ids=["before attach", "after attach"])
@pytest.mark.parametrize("place", PLACES)
def test_a_hook_that_changes_hidden_states_is_honoured_in_any_order(place: str, after: bool):
    """The formula of the model with the hook: what the head and the second block read."""
    name, register, hook = PLACES[place]
    model, given = make("llama"), batch()
    if not after:
        getattr(model.get_submodule(name), register)(hook)
    handle = nitp_ops.attach(model, "ntp + 0.8*nitp(target_layer=1)")
    if after:
        getattr(model.get_submodule(name), register)(hook)
    loss = model(**given).loss
    expected = model.eval()(**given)
    second: list[Tensor] = []
    model.model.layers[1].register_forward_pre_hook(lambda module, args: second.append(args[0]))
    body = model.model(given["input_ids"], attention_mask=given["attention_mask"])
    torch.testing.assert_close(
        handle.metrics.compute()["loss/ntp"], expected.loss.item(), rtol=1e-6, atol=1e-6
    )
    model.nitp_objective.eval()
    own = model.nitp_objective(
        nitp_ops.objectives.Streams(
            token_ids=given["input_ids"], labels=given["labels"], attention_mask=given["attention_mask"],
            last_hidden=body.last_hidden_state, hidden_states={1: second[0].detach()}, head=model.lm_head,
        )
    )  # fmt: skip
    torch.testing.assert_close(loss, own.loss, rtol=1e-12, atol=1e-12)


def test_the_hooks_of_accelerate_on_every_module_change_nothing():
    hooks = pytest.importorskip("accelerate.hooks")
    model, given = make("llama"), batch()
    expected = model(**given).loss
    for module in list(model.modules()):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))
    nitp_ops.attach(model, "ntp + 0*nitp")
    torch.testing.assert_close(
        model(**given).loss, expected, check_dtype=False, rtol=1e-6, atol=1e-6
    )


def test_a_head_that_accelerate_keeps_elsewhere_is_refused_by_name():
    hooks = pytest.importorskip("accelerate.hooks")
    model = make("llama")
    weights = {"weight": model.lm_head.weight.data.clone()}
    hook = hooks.AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights)
    hooks.add_hook_to_module(model.lm_head, hook)
    with pytest.raises(
        ValueError,
        match=r"head is offloaded by accelerate \(device_map\), "
        r"expected its weight on",
    ):
        nitp_ops.attach(model, "ntp")


@pytest.mark.parametrize("first", ["attach", "debug"])
def test_the_hooks_of_transformers_that_watch_for_overflow_change_nothing(first: str):
    """TrainingArguments(debug="underflow_overflow") hooks every module, the head too."""
    model, given = make("llama"), batch()
    spec = "ntp + 0.8*nitp(target_layer=1) + 0.1*mtp_shared"
    handle = nitp_ops.attach(model, spec)
    expected = gradients(model(**given).loss, model)
    if first == "debug":
        handle.detach()
    watching = DebugUnderflowOverflow(model)
    if first == "debug":
        nitp_ops.attach(model, spec)
    found = gradients(model(**given).loss, model)
    assert watching.batch_number > 0
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


def masks_columns(logits: Tensor) -> Tensor:
    return (
        logits.index_fill(-1, torch.arange(50, logits.shape[-1]), float("-inf"))
        if logits.shape[-1] > 50
        else logits
    )


def drops_columns(logits: Tensor) -> Tensor:
    return logits[..., :60]


def adds_a_row_of_columns(logits: Tensor) -> Tensor:
    return logits + torch.linspace(0, 1, 64, dtype=logits.dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            masks_columns,
            r"forward masks or shifts 14 columns of its logits, the first 50, "
            r"expected the same",
        ),
        (drops_columns, r"logits have shape \(1, 2, 60\), expected \(1, 2, 64\)"),
        (adds_a_row_of_columns, r"logits have shape \(1, 20, 64\) of a head of one column"),
    ],
)
def test_a_forward_that_treats_columns_of_the_logits_differently_is_refused(
    change: Any, message: str
):
    """As for a padded vocabulary, or for ids of images that must not be generated."""
    model = make("llama")
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        return type(out)(**{**out, "logits": change(out.logits)})

    model.forward = forward
    with pytest.raises(ValueError, match=message):
        nitp_ops.attach(model, "ntp")
