"""Windows of targets as long as the sequence: exact, and never a tensor of [B, T, window]."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nitp_ops.objectives import TOP, ModelInfo, Streams, build

ROWS, LENGTH, VOCABULARY = 2, 300, 400


def batch(dtype: torch.dtype, **changes: Any) -> Streams:
    """Three documents a row, of which the first comes back; long stretches without any target."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=draw)
    documents = torch.tensor([0, 1, 0, -1, 2]).repeat_interleave(LENGTH // 5).repeat(ROWS, 1)
    mask = torch.rand(ROWS, LENGTH, generator=draw) < 0.8
    mask[0, 10:170] = False
    hidden = (
        torch.randn(ROWS, LENGTH, 6, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    )
    given = {
        "token_ids": ids,
        "document_ids": documents,
        "target_mask": mask,
        "last_hidden": hidden,
    }
    return Streams(**(given | changes))


def distances(streams: Streams, first: int, last: int) -> Tensor:
    """k of the nearest x_{t+k} = v that is a target, first <= k <= last, else infinity: [B, T, V]."""
    ids, documents, mask = streams.token_ids, streams.document_ids, streams.target_mask
    assert ids is not None and documents is not None and mask is not None
    found = torch.full((ROWS, LENGTH, VOCABULARY), torch.inf, dtype=torch.float64)
    for k in range(min(last, LENGTH - 1), first - 1, -1):
        same = (documents[:, k:] == documents[:, :-k]) & (documents[:, k:] >= 0) & mask[:, k:]
        b, t = same.nonzero(as_tuple=True)
        found[b, t, ids[b, t + k]] = k
    return found


@pytest.mark.parametrize("compat", ["none", "fp16_scores"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("window", [100, 5000])
def test_top_over_a_long_window_is_the_dense_list_net_loss(
    window: int, dtype: torch.dtype, compat: str
):
    streams = batch(dtype)
    info = ModelInfo(
        hidden_size=6, vocab_size=VOCABULARY, num_layers=1, dtype=dtype, initializer_range=1.0
    )
    objective = build([TOP(window=window, compat=compat)], model=info)  # type: ignore[arg-type]
    out, (head,) = objective(streams), objective.parameters()
    k = distances(streams, 1, window)
    y = window + 1 - k
    y = (y.half() if compat == "fp16_scores" else y).double().masked_fill(k.isinf(), -torch.inf)
    rows = y.isfinite().any(-1)
    hidden = streams.last_hidden
    assert hidden is not None
    log_p = (hidden.double() @ head.double().T).log_softmax(-1)
    expected = -(y[rows].softmax(-1) * log_p[rows]).sum(-1).mean()
    torch.testing.assert_close(
        out.loss.double(), expected, rtol=1e-12 if dtype == torch.float64 else 2e-6, atol=0
    )
    mine, exact = (
        torch.autograd.grad(x, [hidden, head], retain_graph=True) for x in (out.loss, expected)
    )
    for a, b in zip(mine, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9 if dtype == torch.float64 else 1e-4, atol=1e-7)
    assert out.metrics.compute()["top/count"] == rows.sum()


@pytest.mark.parametrize("tau", [50, 2000])
def test_a_bag_of_a_long_window_is_the_set_of_its_tokens(tau: int, monkeypatch: pytest.MonkeyPatch):
    from nitp_ops.objectives.latent import fsp_bow

    monkeypatch.setattr(fsp_bow, "_BAG_TOKENS", 7 * tau)  # seven rows at a time
    streams = batch(torch.float64)
    info = ModelInfo(
        hidden_size=6,
        vocab_size=VOCABULARY,
        num_layers=1,
        dtype=torch.float64,
        initializer_range=1.0,
    )
    objective = build(f"fsp_bow(tau={tau})", model=info)
    out, (head,) = objective(streams), objective.parameters()
    inside = distances(streams, 2, tau).isfinite()
    rows = inside.any(-1)
    assert streams.last_hidden is not None
    z = streams.last_hidden @ head.T
    expected = F.binary_cross_entropy_with_logits(z[rows], inside[rows].double())
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    for mine, exact in zip(
        *(
            torch.autograd.grad(x, [streams.last_hidden, head], retain_graph=True)
            for x in (out.loss, expected)
        ),
        strict=True,
    ):
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-12)
    metrics = out.metrics.compute()
    assert metrics["fsp_bow/count"] == rows.sum()
    assert metrics["fsp_bow/tokens"] == pytest.approx((inside.sum() / rows.sum()).item())


class Largest(TorchDispatchMode):
    """The most numbers that one tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.numbers = max(
                    self.numbers, value.untyped_storage().nbytes() // value.element_size()
                )
        return result


@pytest.mark.parametrize("spec", ["top(window={})", "fsp_bow(tau={})"])
def test_no_tensor_has_a_column_for_every_token_of_the_window(spec: str):
    length = 2048
    ids = torch.randint(50, (1, length))
    streams = Streams(token_ids=ids, last_hidden=torch.randn(1, length, 4, requires_grad=True))
    objective = build(
        spec.format(length), model=ModelInfo(hidden_size=4, vocab_size=50, num_layers=1)
    )
    with Largest() as largest:
        counts = objective.count(streams)
        objective(streams, counts=counts).loss.backward()
    assert length * 50 <= largest.numbers < length * length // 8
