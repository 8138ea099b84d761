"""What stands in rows that do not count reaches nothing, whatever function is applied to rows
before the mask."""

from __future__ import annotations

import pytest
import torch

from nitp_ops.engine.modules.logit_losses import sum_of_rows
from nitp_ops.objectives import build
from tests.support.objectives_cases import INFO, gradients, make_batch

TWO_SIDED = "nitp(stop_gradient=false, target_norm=rms)"
#: No position looks at another: a row that no pair counts is one that does not count.
ROW_BY_ROW = (
    TWO_SIDED,
    "nitp(stop_gradient=false, target_norm=rms, distance=mse, projector=none)",
    "next_embedding(stop_gradient=false, target_norm=rms, shift=2)",
    "nitp(target_norm=rms)",
    "mtp_parallel(offsets=[2, 3], heads=residual)",
    "mtp_shared(offsets=[2])",
    "fsp_bow(tau=3)",
    "top",
    "ntp",
)
SPECS = (
    *ROW_BY_ROW,
    "nextlat",
    "cosine_regularizer",
    "mtp_parallel(offsets=[2])",
    "mtp_sequential(depth=2)",
)


@pytest.mark.parametrize(
    ("spec", "padded"), [*((spec, True) for spec in SPECS), *((spec, False) for spec in ROW_BY_ROW)]
)
def test_a_nan_in_a_row_that_does_not_count_stays_there(spec: str, padded: bool):
    batch, objective = make_batch(), build(spec, model=INFO)
    if padded:
        batch.documents = torch.tensor([[0, 0, 0, 1, 1, -1, -1]] * 3)
        with torch.no_grad():  # padding is a token of its own, of which nothing is known
            batch.ids[:, 5:] = 9
            batch.ids[:, :5] %= 9
        spoiled = {"hidden": slice(5, 7), "states": slice(5, 7)}
    # the last hidden state has no target, and what comes before any hidden state's target is none
    else:
        spoiled = {"hidden": slice(6, 7), "states": slice(0, 1)}
    own = [*objective.parameters()]
    with torch.no_grad():
        for parameter in own:  # residual heads start at zero
            parameter.add_(
                torch.linspace(-0.3, 0.4, parameter.numel(), dtype=parameter.dtype).view(
                    parameter.shape
                )
            )

    def outcome(value: float) -> tuple[torch.Tensor, dict[str, float], list[torch.Tensor]]:
        with torch.no_grad():
            batch.hidden[:, spoiled["hidden"]] = value
            batch.residual[:, spoiled["hidden"]] = value
            for state in batch.states.values():
                state[:, spoiled["states"]] = value
            if padded:
                batch.embed.weight[9] = value
        streams = batch.streams()
        streams.external = {}
        out = objective(streams)
        return out.loss, out.metrics.compute(), gradients(out.loss, [*batch.leaves, *own])

    (clean, metrics, expected), (loss, other, found) = outcome(0.5), outcome(float("nan"))
    assert clean.isfinite() and torch.equal(loss, clean)
    assert other == pytest.approx(metrics, nan_ok=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    if spec == TWO_SIDED:  # leaves: hidden, residual, then the states
        assert not found[3][:, spoiled["states"]].any() and found[3].any()


def test_rows_of_a_formula_that_are_not_kept_have_no_gradient_whatever_the_head_holds():
    """Nor has any under an upstream of zero."""
    hidden, weight = torch.randn(5, 6, requires_grad=True), torch.randn(11, 6)
    weight[3, 2] = torch.nan
    keep = torch.tensor([True, False, True, False, True])
    total, _ = sum_of_rows(
        hidden, weight, None, keep, INFO, lambda z, rows: (z.sum(1), torch.ones_like(z))
    )
    (gradient,) = torch.autograd.grad(total, hidden, retain_graph=True)
    assert not gradient[~keep].any() and gradient[keep].isnan().any()
    (gradient,) = torch.autograd.grad(total, hidden, torch.zeros_like(total))
    assert not gradient.any()
