"""Head terms in one pass: the plan equals the sum of its terms, and a weight of zero keeps a term
out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nitp_ops.engine.plan import head_passes
from nitp_ops.engine.plan.head_terms import _several
from nitp_ops.objectives import NITP, NTP, ModelInfo, Streams, build
from tests.support.objectives_cases import INFO, Batch, assert_same, gradients, make_batch


@settings(deadline=None, max_examples=25)
@given(
    weights=st.lists(st.sampled_from([0.0, 0.3, 1.0, 2.5]), min_size=1, max_size=4),
    smoothing=st.sampled_from([0.0, 0.2]),
    z_loss=st.sampled_from([0.0, 0.01]),
    softcap=st.sampled_from([None, 4.0]),
    bias=st.booleans(),
    masked=st.lists(st.booleans(), min_size=21, max_size=21),
)
def test_the_plan_equals_the_sum_of_its_terms(weights, smoothing, z_loss, softcap, bias, masked):
    info = ModelInfo(
        hidden_size=6, vocab_size=11, num_layers=5, softcap=softcap, dtype=torch.float64
    )
    batch = make_batch(bias=bias)
    batch.extra["target_mask"] = torch.tensor(masked).view(3, 7)
    terms = [
        NTP(label=f"head{i}", weight=w, label_smoothing=smoothing * (i % 2), z_loss=z_loss)
        for i, w in enumerate(weights)
    ]
    combined = build(terms, model=info)(batch.streams()).loss
    alone = torch.stack([build([term], model=info)(batch.streams()).loss for term in terms]).sum()
    assert_same(combined, alone, batch.leaves)


def test_head_terms_of_one_head_share_one_pass(monkeypatch: pytest.MonkeyPatch):
    calls = []
    real = head_passes.grouped_linear_cross_entropy
    monkeypatch.setattr(
        head_passes,
        "grouped_linear_cross_entropy",
        lambda terms, *a, **k: calls.append(len(terms)) or real(terms, *a, **k),
    )
    build("ntp + a: 0.5*ntp(z_loss=1) + nitp + b: 0*ntp", model=INFO)(make_batch().streams())
    assert calls == [3]


def spoiled(batch: Batch) -> Batch:
    with torch.no_grad():
        batch.states[1].fill_(torch.nan)
    return batch


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    "extra",
    [
        NITP(weight=0),
        NITP(weight=0, stop_gradient=False),
        NITP(weight=0, distance="mse"),
        NTP(label="more", weight=0, z_loss=0.1),
        NITP(weight={"to": 1.0, "begin": 10}),
    ],
    ids=["nitp", "two-sided nitp", "mse", "a second head term", "a schedule before its begin"],
)
def test_a_term_of_weight_zero_leaves_the_other_gradients_bit_identical(
    extra: NTP | NITP, backend: str | None
):
    batch = make_batch()
    main = gradients(build("ntp", model=INFO, backend=backend)(batch.streams()).loss, batch.leaves)
    objective = build([NTP(), extra], model=INFO, backend=backend)
    out = objective(batch.streams(), step=3)
    for mine, other in zip(main, gradients(out.loss, batch.leaves), strict=True):
        assert torch.equal(mine, other)
    assert out.metrics.compute()[f"loss/{extra.label or extra.name}"] == 0


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_a_nan_under_a_weight_of_zero_stays_out_and_parameters_still_get_zeros(
    stop_gradient: bool, backend: str | None
):
    batch = spoiled(make_batch())
    main = build("ntp", model=INFO)(batch.streams()).loss
    objective = build(
        [NTP(), NITP(weight=0, stop_gradient=stop_gradient)], model=INFO, backend=backend
    )
    out = objective(batch.streams())
    expected = gradients(main, batch.leaves)
    out.loss.backward()
    torch.testing.assert_close(out.loss, main)
    for tensor, wanted in zip(batch.leaves, expected, strict=True):
        got = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    for parameter in objective.parameters():
        assert parameter.grad is not None and torch.equal(
            parameter.grad, torch.zeros_like(parameter)
        )
    metrics = out.metrics.compute()
    assert (
        metrics["loss"] == pytest.approx(main.item())
        and metrics["nitp/loss"] != metrics["nitp/loss"]
    )


def test_a_nan_in_projector_weights_of_weight_zero_stays_out():
    batch = make_batch()
    objective = build("ntp + 0*nitp", model=INFO)
    with torch.no_grad():
        next(objective.parameters()).fill_(torch.nan)
    out = objective(batch.streams())
    assert out.loss.isfinite() and all(
        g.isfinite().all() for g in gradients(out.loss, batch.leaves)
    )


def test_a_term_of_weight_zero_is_still_measured():
    batch = make_batch()
    inactive = build("ntp + 0*nitp", model=INFO)(batch.streams()).metrics.compute()
    active = build("ntp + nitp", model=INFO)(batch.streams()).metrics.compute()
    assert (
        inactive["nitp/loss"] == active["nitp/loss"]
        and inactive["nitp/skill"] == active["nitp/skill"]
    )


def test_missing_streams_are_named_before_anything_runs():
    streams = Streams(token_ids=make_batch().ids)
    with pytest.raises(
        ValueError,
        match=r"streams lacks head, hidden_states\[1\], last_hidden, "
        r"expected",
    ):
        build("ntp + nitp", model=INFO)(streams)


def test_a_hidden_stream_of_another_width_is_refused():
    batch = make_batch()
    with pytest.raises(
        ValueError,
        match=r"last_hidden has shape \(3, 7, 5\), expected \(3, 7, "
        r"6\)",
    ):
        build("ntp + nitp", model=INFO)(batch.streams(last_hidden=batch.hidden[..., :5]))


def test_terms_that_read_one_narrow_stream_share_a_float32_gradient():
    """Equal to the float32 sum of the separate gradients, rounded once; separate ones are rounded
    once each."""
    batch = make_batch(batch=4, length=40)
    head = nn.Linear(INFO.hidden_size, INFO.vocab_size, dtype=torch.bfloat16)
    info = replace(INFO, dtype=torch.bfloat16)
    streams = {
        "head": head,
        "hidden_states": {1: batch.states[1].detach().bfloat16()},
        "last_residual": None,
    }

    def gradient(spec: str, dtype: torch.dtype) -> Tensor:
        hidden = batch.hidden.detach().bfloat16().to(dtype).requires_grad_()
        loss = build(spec, model=info, seed=3)(batch.streams(**streams, last_hidden=hidden)).loss
        return torch.autograd.grad(loss, hidden)[0]

    specs = "ntp", "nitp", "b: ntp(z_loss=0.1)", "c: ntp(label_smoothing=0.3)"
    combined = gradient(" + ".join(specs), torch.bfloat16)
    apart = torch.stack([gradient(spec, torch.float32) for spec in specs]).sum(0)
    assert combined.dtype == torch.bfloat16
    assert (combined.float() - apart.bfloat16().float()).norm() <= 2**-9 * apart.norm()
    rounded = sum(gradient(spec, torch.bfloat16) for spec in specs)  # as autograd adds them
    assert isinstance(rounded, Tensor)
    assert (combined.float() - apart).norm() < (rounded.float() - apart).norm()


def test_other_hidden_states_leave_the_rest_of_the_streams_as_it_is():
    @dataclass(kw_only=True)
    class More(Streams):
        teacher: Tensor | None = None

    batch = make_batch()
    streams = More(
        token_ids=batch.ids,
        document_ids=batch.ids,
        last_hidden=batch.hidden,
        teacher=batch.residual,
    )
    wide = batch.hidden.detach()
    other = streams.with_hidden({"last_hidden": wide})
    # the same objects: tensors are not compared by value
    assert type(other) is More and {k: id(v) for k, v in vars(other).items()} == {
        k: id(v) for k, v in (vars(streams) | {"last_hidden": wide}).items()
    }


def test_a_negative_label_among_several_is_an_error_and_no_absent_target():
    labels = torch.tensor([[-1, 3, -100]])
    assert _several(labels, -100).tolist() == [[torch.iinfo(torch.int64).max, 3, -100]]


def test_gradients_of_two_terms_into_a_narrow_stream_are_rounded_once():
    info = ModelInfo(
        hidden_size=16, vocab_size=32, num_layers=2, dtype=torch.bfloat16, initializer_range=0.5
    )
    narrow, head = torch.randn(3, 20, 16).bfloat16(), nn.Linear(16, 32, bias=False).bfloat16()
    objective = build("ntp + nitp(target_layer=1)", model=info)
    ids, states = torch.randint(32, (3, 20)), {1: torch.randn(3, 20, 16).bfloat16()}

    def gradient(hidden: Tensor) -> Tensor:
        streams = Streams(
            token_ids=ids, last_hidden=hidden.requires_grad_(), hidden_states=states, head=head
        )
        return torch.autograd.grad(objective(streams).loss, hidden)[0]

    assert torch.equal(gradient(narrow.clone()), gradient(narrow.float()).bfloat16())
