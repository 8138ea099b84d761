"""Building: parameters, seeds, the meta device, the registry, and what explain says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nitp_ops.objectives import (
    NITP,
    ModelInfo,
    Need,
    SpecError,
    Streams,
    build,
)
from tests.support.objectives_cases import INFO, make_batch


def info(**changes: object) -> ModelInfo:
    return ModelInfo(**{"hidden_size": 8, "vocab_size": 32, "num_layers": 17, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fraction", "layers", "layer"),
    [
        (0.2, 17, 4),
        (0.2, 24, 5),
        (0.2, 28, 6),
        (0.2, 16, 3),
        (0.01, 17, 1),
        (0.999, 17, 16),
        (0.2, 1, 0),
        (0.9, 2, 1),
    ],
)
def test_a_fraction_of_the_depth_resolves_to_a_layer(fraction: float, layers: int, layer: int):
    objective = build([NITP(target_layer=fraction)], model=info(num_layers=layers))
    assert Need("hidden_states", layer=layer, grad=False) in objective.requires


@pytest.mark.parametrize("layer", [0, 16])
def test_an_integer_target_layer_is_a_number_of_blocks(layer: int):
    needs = build([NITP(target_layer=layer)], model=info()).requires
    assert Need("hidden_states", layer=layer, grad=False) in needs


def test_a_target_layer_outside_the_model_is_refused_with_every_other_problem():
    with pytest.raises(SpecError) as caught:
        build("nitp(target_layer=17) + b: nitp(target_layer=40) + ntp", model=info())
    assert caught.value.problems == (
        "nitp: target_layer is 17, expected an integer in [0, 16] (the model has 17 blocks)",
        "b: target_layer is 40, expected an integer in [0, 16] (the model has 17 blocks)",
    )


def test_what_does_not_fit_the_model_stands_beside_what_is_no_spec():
    with pytest.raises(SpecError) as caught:
        build("ntpp + nitp(target_layer=17) + top(window=0)", model=info())
    unknown, window, layer = caught.value.problems
    assert unknown.startswith('"ntpp" is no objective') and window.startswith("top: window is 0")
    assert layer.startswith("nitp: target_layer is 17")


def test_the_state_dict_holds_own_parameters_only():
    objective = build(
        "ntp + nitp + flat: nitp(projector=linear) + bare: nitp(projector=none)", model=info()
    )
    batch_head = nn.Linear(8, 32)
    hidden = torch.randn(1, 4, 8)
    states = {4: hidden}
    objective(
        Streams(
            token_ids=torch.zeros(1, 4).long(),
            last_hidden=hidden,
            hidden_states=states,
            head=batch_head,
        )
    )
    assert {name: tuple(p.shape) for name, p in objective.state_dict().items()} == {
        "terms.nitp.gate_up": (64, 8),
        "terms.nitp.down": (8, 32),
        "terms.flat.down": (8, 8),
    }
    assert all(type(parameter) is nn.Parameter for parameter in objective.parameters())
    assert not any(isinstance(module, nn.Linear) for module in objective.modules())


def test_ntp_alone_adds_no_parameter():
    assert list(build("ntp", model=info()).parameters()) == []


def test_the_seed_alone_decides_the_initial_values():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build("ntp + nitp", model=info(), seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = build("extra: nitp + nitp", model=info(), seed=3).state_dict()
    other = build("ntp + nitp", model=info(), seed=4).state_dict()
    for name, value in first.items():
        assert torch.equal(value, again[name]) and not torch.equal(value, other[name])
        assert not torch.equal(value, again[name.replace("nitp", "extra")])


def test_initial_values_are_normal_with_the_range_of_the_model():
    values = torch.cat(
        [p.flatten() for p in build("nitp", model=info(hidden_size=64)).parameters()]
    )
    assert values.numel() == 12 * 64**2
    assert values.std().item() == pytest.approx(0.02, rel=0.02) and abs(values.mean().item()) < 1e-3


def test_an_objective_builds_on_the_meta_device_and_is_filled_later():
    with torch.device("meta"):
        objective = build("ntp + nitp", model=info(), seed=5)
    assert all(parameter.is_meta for parameter in objective.parameters())
    objective.to_empty(device="cpu").reset_parameters()
    for mine, expected in zip(
        objective.parameters(), build("nitp", model=info(), seed=5).parameters(), strict=True
    ):
        assert torch.equal(mine, expected)


def test_own_parameters_have_the_dtype_of_the_model():
    parameters = list(build("nitp", model=info(dtype=torch.bfloat16)).parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}


def test_a_projector_whose_last_matrix_is_zero_is_refused():
    batch, objective = make_batch(), build("ntp + nitp", model=INFO)
    with torch.no_grad():
        objective.terms["nitp"].down.zero_()  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match="down is all zero, expected initial values"):
        objective(batch.streams())
    with pytest.raises(ValueError, match=r"initializer_range is 0.0, expected a number > 0"):
        info(initializer_range=0.0)


def test_param_groups_hold_every_own_parameter_once_with_matrices_apart():
    objective = build("nitp + b: nitp(projector=linear)", model=info())
    groups = objective.param_groups()
    assert [group["matrices"] for group in groups] == [True]
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in objective.parameters()}
    torch.optim.AdamW(groups)
    objective.terms["nitp"].register_parameter("norm", nn.Parameter(torch.ones(8)))
    assert [(group["matrices"], len(group["params"])) for group in objective.param_groups()] == [
        (True, 3),
        (False, 1),
    ]
    assert build("ntp", model=info()).param_groups() == []


def test_explain_resolves_layers_weights_parameters_and_flops():
    text = build("ntp + schedule(to=0.8, warmup=9)*nitp", model=info()).explain()
    for part in (
        "hidden_states[4] of 17 blocks",
        "Ramp(to=0.8, begin=0, warmup=9",
        f"{12 * 64} (12 d^2)",
        f"{72 * 64 + 18 * 8:,} (72 d^2 + 18 d)",
        f"{6 * 32 * 8:,} (6 V d)",
        "1 head term of 2 terms, 768 parameters added",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0, expected an integer >= 1"),
        ({"num_layers": 2.0}, "num_layers is 2.0, expected an integer"),
        ({"vocab_size": True}, "vocab_size is True, expected an integer"),
        ({"softcap": -1.0}, "softcap is -1.0, expected a number > 0"),
        ({"logit_scale": None}, "logit_scale is None, expected a number"),
        ({"dtype": torch.int64}, "dtype is torch.int64, expected a floating point dtype"),
    ],
    ids=str,
)
def test_a_model_info_that_cannot_be_is_refused(changes: dict, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        info(**changes)


def test_build_refuses_a_model_in_place_of_its_info():
    with pytest.raises(TypeError, match="model is a Linear, expected a ModelInfo"):
        build("ntp", model=nn.Linear(2, 2))  # type: ignore[arg-type]
