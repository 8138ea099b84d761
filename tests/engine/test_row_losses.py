"""Losses of whole rows of logits, a chunk at a time: any formula gets its gradients, and no [N, V]
tensor appears."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nitp_ops.engine.modules import logit_losses
from nitp_ops.engine.modules.logit_losses import sum_of_rows
from nitp_ops.objectives import ModelInfo
from tests.support.objectives_cases import gradients

INFO = ModelInfo(hidden_size=4, vocab_size=9, num_layers=2, softcap=5.0, logit_scale=1.3)
ROWS, WIDTH, VOCABULARY = 7, 4, 9
KEEP = torch.tensor([True, False, True, True, False, True, True])


def quartic(z: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    return z.pow(4).sum(-1), 4 * z.pow(3)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.fixture(params=[1, 3, 100], ids="chunks of {} rows".format)
def chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(logit_losses, "CHUNK_LOGITS", request.param * VOCABULARY)
    return request.param


@pytest.mark.usefixtures("chunk_rows")
def test_it_is_the_sum_over_kept_rows_with_the_gradients_of_autograd():
    hidden, weight, bias = leaf(ROWS, WIDTH), leaf(VOCABULARY, WIDTH), leaf(VOCABULARY).detach()
    expected = (5 * torch.tanh(1.3 * (hidden @ weight.T + bias) / 5)).pow(4).sum(-1)
    loss, rows = sum_of_rows(hidden, weight, bias, KEEP, INFO, quartic)
    torch.testing.assert_close(rows, expected.detach() * KEEP)
    torch.testing.assert_close(loss, expected[KEEP].sum())
    ours, theirs = (
        gradients(x, [hidden, weight]) for x in (0.37 * loss, 0.37 * expected[KEEP].sum())
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_its_gradient_is_that_of_finite_differences():
    hidden, weight = leaf(ROWS, WIDTH), leaf(VOCABULARY, WIDTH)
    assert torch.autograd.gradcheck(
        lambda h, w: sum_of_rows(h, w, None, KEEP, INFO, quartic)[0], (hidden, weight)
    )


@pytest.mark.usefixtures("chunk_rows")
def test_a_row_that_is_not_kept_reaches_nothing_whatever_it_holds():
    hidden, weight = leaf(ROWS, WIDTH), leaf(VOCABULARY, WIDTH)

    def spoiling(z: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        losses, dz = quartic(z, rows)
        return losses.masked_fill(~KEEP[rows], torch.nan), dz.masked_fill(
            ~KEEP[rows].unsqueeze(1), torch.inf
        )

    clean, _ = sum_of_rows(hidden, weight, None, KEEP, INFO, quartic)
    expected = gradients(clean, [hidden, weight])
    with torch.no_grad():
        hidden[~KEEP] = torch.nan
    loss, rows = sum_of_rows(hidden, weight, None, KEEP, INFO, spoiling)
    assert torch.equal(loss, clean) and not rows[~KEEP].any()
    for mine, other in zip(gradients(loss, [hidden, weight]), expected, strict=True):
        assert torch.equal(mine, other)


def test_only_wanted_gradients_are_formed():
    hidden, weight = leaf(ROWS, WIDTH), leaf(VOCABULARY, WIDTH)
    with Seen() as both:
        sum_of_rows(hidden, weight, None, KEEP, INFO, quartic)
    with Seen() as frozen:
        sum_of_rows(hidden, weight.detach(), None, KEEP, INFO, quartic)
    with Seen() as forward, torch.no_grad():
        sum_of_rows(hidden, weight, None, KEEP, INFO, quartic)
    assert (both.gemms, frozen.gemms, forward.gemms) == (3, 2, 1)


def test_the_gradient_of_a_narrow_weight_is_summed_over_chunks_in_float32(
    monkeypatch: pytest.MonkeyPatch,
):
    hidden, weight = (
        leaf(512, WIDTH, dtype=torch.bfloat16),
        leaf(VOCABULARY, WIDTH, dtype=torch.bfloat16),
    )
    keep = torch.ones(512, dtype=torch.bool)
    exact_hidden, exact = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = gradients(sum_of_rows(exact_hidden, exact, None, keep, INFO, quartic)[0], [exact])[0]

    def error(rows: int) -> float:
        monkeypatch.setattr(logit_losses, "CHUNK_LOGITS", rows * VOCABULARY)
        mine = gradients(sum_of_rows(hidden, weight, None, keep, INFO, quartic)[0], [weight])[0]
        assert mine.dtype == torch.bfloat16
        return float((mine.double() - expected).norm() / expected.norm())

    assert error(1) < 2 * error(512)


def test_a_tiny_upstream_gradient_survives_a_float16_weight():
    hidden, weight = (
        leaf(ROWS, WIDTH, dtype=torch.float32),
        leaf(VOCABULARY, WIDTH, dtype=torch.float16),
    )
    loss, _ = sum_of_rows(hidden, weight, None, KEEP, INFO, quartic)
    (one,), (tiny,) = gradients(loss, [hidden]), gradients(1e-9 * loss, [hidden])
    torch.testing.assert_close(1e9 * tiny, one, rtol=1e-6, atol=1e-6)


def test_a_second_derivative_is_refused():
    hidden, weight = leaf(ROWS, WIDTH), leaf(VOCABULARY, WIDTH)
    (first,) = torch.autograd.grad(
        sum_of_rows(hidden, weight, None, KEEP, INFO, quartic)[0], hidden, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="got a double backward"):
        first.sum().backward()


def test_no_row_at_all_gives_zeros():
    hidden, weight = leaf(0, WIDTH), leaf(VOCABULARY, WIDTH)
    loss, rows = sum_of_rows(hidden, weight, None, torch.ones(0, dtype=torch.bool), INFO, quartic)
    assert loss.item() == 0 and rows.shape == (0,) and not gradients(loss, [weight])[0].any()


def test_no_tensor_is_larger_than_a_chunk_of_logits_or_the_weight(monkeypatch: pytest.MonkeyPatch):
    rows, vocabulary, chunk = 60, 50, 5
    monkeypatch.setattr(logit_losses, "CHUNK_LOGITS", chunk * vocabulary)
    hidden, weight = leaf(rows, WIDTH), leaf(vocabulary, WIDTH)
    keep = torch.ones(rows, dtype=torch.bool)
    with Seen() as seen:
        sum_of_rows(hidden, weight, None, keep, INFO, quartic)[0].backward()
    assert seen.largest == chunk * vocabulary < rows * vocabulary / 2
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        sum_of_rows(hidden, weight, None, keep, INFO, quartic)
    assert sorted(x.shape for x in kept) == [*2 * [(vocabulary, WIDTH)], *2 * [(rows, WIDTH)]]


class Seen(TorchDispatchMode):
    """Counts GEMMs and remembers the most elements that any op returned."""

    gemms, largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.gemms += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out
