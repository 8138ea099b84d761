"""linear_cross_entropy: weighted targets, class weights, entropy, precision of the logits, buffers,
float16."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nitp_ops import linear_cross_entropy, reference
from tests.support.budget import close, outputs, widened, within_budget

BOTH = pytest.mark.parametrize("backend", [None, "reference"])


def make(rows=12, width=6, vocabulary=31, dtype=torch.float64):
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, vocabulary, (rows,))


@BOTH
def test_one_target_of_weight_one_is_a_plain_label(backend):
    hidden, weight, labels = make()
    labels[3] = -100
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "backend": backend}
    plain = outputs(lambda h, w: linear_cross_entropy(h, w, labels, **options), [hidden, weight])
    ones = torch.ones(12, 1, dtype=torch.float64)
    several = outputs(
        lambda h, w: linear_cross_entropy(h, w, labels[:, None], target_weight=ones, **options),
        [hidden, weight],
    )
    for a, b in zip(several, plain, strict=True):
        close(a, b)


@given(st.integers(0, 2**20), st.integers(1, 40))
def test_weighted_targets_are_the_dense_soft_label_cross_entropy(seed, several):
    """-sum_v y_v log p_v with y_v the sum of the weights of the targets v: duplicates add, negative
    ones are absent."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, _ = make(rows=5, vocabulary=9)
    labels = torch.randint(-1, 9, (5, several), generator=generator)
    weights = torch.rand(5, several, generator=generator, dtype=torch.float64)
    dense = torch.zeros(5, 9, dtype=torch.float64)
    dense.scatter_add_(1, labels.clamp(min=0), weights.where(labels >= 0, 0))
    rows = (labels >= 0).any(1).sum().clamp(min=1)
    ours = outputs(
        lambda h, w: linear_cross_entropy(h, w, labels, target_weight=weights, chunk_bytes=150),
        [hidden, weight],
    )
    exact = outputs(
        lambda h, w: -(dense * (h @ w.T).log_softmax(-1)).sum() / rows, [hidden, weight]
    )
    for a, b in zip(ours, exact, strict=True):
        close(a, b)


def test_duplicate_targets_in_bfloat16_are_rounded_once():
    hidden, weight, labels = make(dtype=torch.bfloat16)
    pair = labels[:, None].expand(12, 2)
    halves = torch.full((12, 2), 0.5)
    together = outputs(
        lambda h, w: linear_cross_entropy(h, w, pair, target_weight=halves), [hidden, weight]
    )
    plain = outputs(lambda h, w: linear_cross_entropy(h, w, labels), [hidden, weight])
    for a, b in zip(together, plain, strict=True):
        assert torch.equal(a, b)


def test_the_order_of_targets_changes_nothing_beyond_rounding():
    hidden, weight, _ = make()
    labels, weights = torch.randint(-1, 31, (12, 7)), torch.rand(12, 7, dtype=torch.float64)
    order = torch.randperm(7)
    results = [
        outputs(
            lambda h, w, o=o: linear_cross_entropy(h, w, labels[:, o], target_weight=weights[:, o]),
            [hidden, weight],
        )
        for o in (torch.arange(7), order)
    ]
    for a, b in zip(*results, strict=True):
        close(a, b)


@BOTH
def test_a_row_counts_once_if_any_target_is_present(backend):
    hidden, weight, _ = make(rows=3)
    labels = torch.tensor([[1, 2], [-1, 4], [-100, -7]])
    ones = torch.ones(3, 2, dtype=torch.float64)
    options = {"target_weight": ones, "backend": backend}
    mean = linear_cross_entropy(hidden, weight, labels, **options)
    total = linear_cross_entropy(hidden, weight, labels, reduction="sum", **options)
    close(mean * 2, total)
    rows, stats = linear_cross_entropy(
        hidden, weight, labels, reduction="none", return_stats=True, **options
    )
    assert rows[2] == 0 and stats.prediction[2] == -1 and stats.log_sum_exp[2].isnan()
    assert stats.target_logit.shape == (3, 2)
    assert stats.target_logit.isnan().tolist() == [[False, False], [True, False], [True, True]]


@BOTH
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_class_weights_are_pytorchs(backend, smoothing, reduction):
    hidden, weight, labels = make()
    labels[5] = -100
    class_weight = torch.rand(31, dtype=torch.float64)
    class_weight[labels[0]] = 0
    options = {"reduction": reduction, "label_smoothing": smoothing}
    ours = outputs(
        lambda h, w: linear_cross_entropy(
            h, w, labels, class_weight=class_weight, backend=backend, **options
        ),
        [hidden, weight],
    )
    exact = outputs(
        lambda h, w: F.cross_entropy(h @ w.T, labels, weight=class_weight, **options),
        [hidden, weight],
    )
    for a, b in zip(ours, exact, strict=True):
        close(a, b)


@BOTH
def test_the_z_loss_is_not_weighted_by_class(backend):
    hidden, weight, labels = make()
    class_weight = torch.zeros(31, dtype=torch.float64)
    options = {"class_weight": class_weight, "z_loss": 0.1, "reduction": "sum", "backend": backend}
    loss = linear_cross_entropy(hidden, weight, labels, **options)
    close(loss, 0.1 * (hidden @ weight.T).logsumexp(-1).square().sum())
    assert (
        linear_cross_entropy(
            hidden, weight, labels, **{**options, "reduction": "mean", "z_loss": 0.0}
        )
        == 0
    )


@BOTH
def test_the_entropy_of_each_row_comes_with_the_stats(backend):
    hidden, weight, labels = make()
    labels[1] = -100
    bias = torch.zeros(31, dtype=torch.float64)
    bias[7], labels[labels == 7] = -float("inf"), 8
    stats = linear_cross_entropy(
        hidden, weight, labels, bias=bias, return_stats="entropy", backend=backend
    )[1]
    entropy = torch.distributions.Categorical(
        logits=(hidden @ weight.T + bias)[:, torch.arange(31) != 7]
    ).entropy()
    keep = labels != -100
    close(stats.entropy[keep], entropy[keep])
    assert stats.entropy[1].isnan() and len(stats) == 5
    assert (
        len(linear_cross_entropy(hidden, weight, labels, return_stats=True, backend=backend)[1])
        == 4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [None, 4 * 700 * 16])
def test_float32_logits_under_narrow_weights_are_as_exact_as_float32_weights(dtype, chunk):
    hidden, weight, labels = make(rows=100, width=48, vocabulary=700, dtype=dtype)
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    ours = outputs(
        lambda h, w: linear_cross_entropy(
            h, w, labels, logits_dtype=torch.float32, chunk_bytes=chunk
        ),
        [hidden, weight],
    )
    eager = outputs(lambda h, w: reference.linear_cross_entropy(h, w, labels), wide)
    exact = outputs(
        lambda h, w: reference.linear_cross_entropy(h, w, labels), widened([hidden, weight])
    )
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype]
    within_budget(ours, eager, exact)


def test_weights_are_widened_a_block_at_a_time(monkeypatch):
    from nitp_ops.core import gemm

    hidden, weight, labels = make(rows=20, width=16, vocabulary=500, dtype=torch.bfloat16)
    whole = outputs(
        lambda h, w: linear_cross_entropy(h, w, labels, logits_dtype=torch.float32),
        [hidden, weight],
    )
    monkeypatch.setattr(gemm, "BLOCK_BYTES", 16 * 4 * 64)
    policy = gemm.GemmPolicy.of(weight.device, torch.float32)
    assert len(gemm.Weight(weight.detach(), policy).blocks) == 8
    blocks = outputs(
        lambda h, w: linear_cross_entropy(h, w, labels, logits_dtype=torch.float32),
        [hidden, weight],
    )
    close(blocks[0], whole[0], 1e-6)
    for a, b in zip(blocks[1:], whole[1:], strict=True):
        close(a, b, 2**-8)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_buffer_takes_the_gradient_with_its_upstream_and_autograd_gets_none(reduction, dtype):
    hidden, weight, labels = make(rows=40, dtype=dtype)
    labels[3:9] = -100
    work = torch.float64 if dtype == torch.float64 else torch.float32
    upstream = 0.37 if reduction == "mean" else torch.rand(40, dtype=work)
    options = {"reduction": reduction, "chunk_bytes": 31 * 8 * 7}
    expected = outputs(
        lambda h, w: linear_cross_entropy(h, w, labels, **options), [hidden, weight], upstream
    )
    into = [torch.full(x.shape, 2.0, dtype=work) for x in (hidden, weight)]
    loss = linear_cross_entropy(
        hidden, weight, labels, hidden_grad_out=into[0], weight_grad_out=into[1], **options
    )
    (loss * upstream).sum().backward(retain_graph=True)
    assert hidden.grad is None and weight.grad is None
    for buffer, gradient in zip(into, expected[1:], strict=True):
        close(
            buffer - 2,
            gradient,
            {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-5}.get(dtype, 1e-12),
        )
    once = [buffer.clone() for buffer in into]
    (loss * upstream).sum().backward()
    for buffer, first in zip(into, once, strict=True):
        close(buffer - first, first - 2, 1e-5 if work == torch.float32 else 1e-12)


def test_two_open_graphs_may_share_one_buffer():
    hidden, weight, labels = make()
    total = torch.zeros_like(weight)
    first = linear_cross_entropy(hidden, weight, labels, reduction="none", weight_grad_out=total)
    second = linear_cross_entropy(hidden, weight, labels.flip(0), weight_grad_out=total)
    first.sum().backward()
    second.backward()
    plain = linear_cross_entropy(hidden, weight, labels, reduction="sum")
    plain = plain + linear_cross_entropy(hidden, weight, labels.flip(0))
    close(total, torch.autograd.grad(plain, weight)[0])


def test_a_bound_on_the_rows_changes_nothing_on_cpu():
    hidden, weight, labels = make()
    bounded = linear_cross_entropy(hidden, weight, labels, max_rows=12)
    assert torch.equal(bounded, linear_cross_entropy(hidden, weight, labels))


def test_float16_gradients_do_not_underflow_under_a_loss_scale():
    """1 / count is 2^-17 here: row gradients below 6e-8 would vanish in float16 before the scale of
    2^16 comes."""
    rows, scale = 2**17, 2.0**16
    hidden, weight, labels = make(rows=64, width=8, vocabulary=50, dtype=torch.float16)
    ours = outputs(
        lambda h, w: linear_cross_entropy(h, w, labels, normalizer=rows), [hidden, weight], scale
    )
    exact = outputs(
        lambda h, w: reference.linear_cross_entropy(h, w, labels, normalizer=rows),
        widened([hidden, weight]),
        scale,
    )
    for a, b in zip(ours[1:], exact[1:], strict=True):
        close(a, b, 2**-10)
