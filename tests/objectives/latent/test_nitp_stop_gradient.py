"""Which blocks of a decoder NITP trains: all of them through h, and none through its target unless
wanted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from experiments.train import model
from nitp_ops import reference
from nitp_ops.objectives import NITP, CompositeObjective, ModelInfo, Streams, build
from tests.support.budget import close

BLOCKS = 4
INFO = ModelInfo(
    hidden_size=16, vocab_size=31, num_layers=BLOCKS, dtype=torch.float64, initializer_range=0.3
)
EVERY_LAYER = pytest.mark.parametrize("layer", range(BLOCKS))


def decoder() -> nn.Module:
    """Four blocks of the example's decoder, in float64."""
    config = model.ModelConfig(
        vocab_size=31, dim=16, layers=BLOCKS, heads=2, kv_heads=1, context=12, initializer_range=0.3
    )
    return model.Decoder(config, seed=1).double()


IDS = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(0))


def nitp_alone(layer: int, **options: object) -> CompositeObjective:
    return build([NITP(target_layer=layer, **options)], model=INFO)  # type: ignore[arg-type]


def trained(
    net: nn.Module,
    objective: CompositeObjective,
    *,
    frozen: Tensor | None = None,
    cut: bool = False,
) -> dict[str, Tensor | None]:
    """Gradients of the decoder under NITP alone. frozen: a constant target; cut: the hidden state
    is detached."""
    (layer,) = (term.layer(INFO) for term in objective.spec.terms if isinstance(term, NITP))
    streams = net(IDS, keep={layer})
    target = streams.hidden_states[layer] if frozen is None else frozen
    hidden = streams.last_hidden.detach() if cut else streams.last_hidden
    loss = objective(Streams(token_ids=IDS, last_hidden=hidden, hidden_states={layer: target})).loss
    named = [*net.named_parameters(), *objective.named_parameters()]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {name: gradient for (name, _), gradient in zip(named, found, strict=True)}


def depth(name: str) -> int:
    """Number of blocks before the parameter's output: 0 the embedding, k block k, one more for the
    final norm."""
    head, _, rest = name.partition(".")
    return {"embed": 0, "blocks": int(rest.partition(".")[0]) + 1 if head == "blocks" else 0}.get(
        head, BLOCKS + 1
    )


def of_decoder(gradients: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {
        name: g for name, g in gradients.items() if name.startswith(("embed", "blocks", "norm"))
    }


@EVERY_LAYER
def test_the_live_target_trains_exactly_as_a_precomputed_constant_does(layer):
    """``z = stopgrad(s_k)``: the same bits in every gradient, so that nothing flows into blocks
    1..k through z; every block, below k and above it, learns through h."""
    net, objective = decoder(), nitp_alone(layer)
    with torch.no_grad():
        constant = net(IDS, keep={layer}).hidden_states[layer].clone()
    learned, frozen = trained(net, objective), trained(net, objective, frozen=constant)
    for name, gradient in learned.items():
        other = frozen[name]
        if name == "lm_head.weight":
            assert gradient is None and other is None
        else:
            assert gradient is not None and other is not None and torch.equal(gradient, other), name
            assert gradient.any(), name
    assert {depth(name) for name in of_decoder(learned)} == set(range(BLOCKS + 2))


@EVERY_LAYER
def test_behind_a_detached_hidden_state_only_the_projector_learns(layer):
    """h is the only way from the loss into the model."""
    for name, gradient in trained(decoder(), nitp_alone(layer), cut=True).items():
        assert (gradient is not None and bool(gradient.any())) == name.startswith("terms."), name


@EVERY_LAYER
def test_without_stop_gradient_the_target_trains_blocks_up_to_k_and_no_other(layer):
    """The gradient through z alone (h detached) reaches the embedding and blocks 1..k."""
    gradients = trained(decoder(), nitp_alone(layer, stop_gradient=False), cut=True)
    for name, gradient in of_decoder(gradients).items():
        assert (gradient is not None and bool(gradient.any())) == (depth(name) <= layer), name


@EVERY_LAYER
def test_without_stop_gradient_the_two_paths_add_up(layer):
    """``dL/dw = (dL/dh)(dh/dw) + (dL/dz)(dz/dw)``: above block k the ablation changes nothing, up
    to it it does."""
    net = decoder()
    through_h = trained(net, nitp_alone(layer))
    both = trained(net, nitp_alone(layer, stop_gradient=False))
    through_z = trained(net, nitp_alone(layer, stop_gradient=False), cut=True)
    for name, total in of_decoder(both).items():
        first, second = through_h[name], through_z[name]
        assert total is not None and first is not None
        if depth(name) > layer:
            close(total, first)
        else:
            assert second is not None
            close(total, first + second, 1e-11)
            assert (total - first).norm() > 1e-3 * first.norm(), name


@EVERY_LAYER
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_both_forms_equal_autograd_of_the_equation(layer, stop_gradient):
    """``mean over t of 1 - cos(P(h_t), z_{t+1})`` with z held or learned, every operation of the model
    by autograd."""
    net, objective = decoder(), nitp_alone(layer, stop_gradient=stop_gradient)
    ours = trained(net, objective)
    own = dict(objective.named_parameters())
    inner = 4 * INFO.hidden_size
    gate_up, down = own["terms.nitp.gate_up"], own["terms.nitp.down"]
    streams = net(IDS, keep={layer})
    z = streams.hidden_states[layer][:, 1:]
    p = reference.projection(streams.last_hidden[:, :-1], gate_up[:inner], gate_up[inner:], down)
    loss = (
        1 - torch.nn.functional.cosine_similarity(p, z.detach() if stop_gradient else z, dim=-1)
    ).mean()
    named = [*net.named_parameters(), *objective.named_parameters()]
    exact = torch.autograd.grad(loss, [x for _, x in named], allow_unused=True)
    for (name, _), expected in zip(named, exact, strict=True):
        got = ours[name]
        assert (got is None) == (expected is None), name
        if got is not None and expected is not None:
            close(got, expected, 1e-11)
