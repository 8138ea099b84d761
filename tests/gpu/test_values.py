"""On a GPU every op gives what the equations give in float64, with any backend's row kernels."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import nitp_ops
import tests.ops.cross_entropy.test_linear_cross_entropy as token
import tests.ops.implicit_token.test_implicit_token_loss as latent
from nitp_ops import reference
from tests.gpu.gpu_cases import (
    BACKENDS,
    DEVICE,
    EVERY_CALL,
    ON_GPU,
    calls,
    labels_and_target,
    moved,
    normal,
    served,
    tensors,
)
from tests.support.budget import close, near, outputs, widened, within_budget

pytestmark = ON_GPU

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NARROW = pytest.mark.parametrize("dtype", DTYPES[1:])
DISTANCES = ["cosine", "mse", "smooth_l1", "kl"]


def on_gpu(options):
    return {name: moved(value) for name, value in options.items()}


@BACKENDS
@given(problem=token.problems())
def test_cross_entropy_equals_the_reference(backend, problem):
    inputs, labels, options, upstream, chunk = problem
    inputs, labels, options, upstream = (
        [moved(x) for x in inputs],
        moved(labels),
        on_gpu(options),
        moved(upstream),
    )
    fused = {**options, "chunk_bytes": chunk, "backend": served(backend)}
    ours = outputs(token.call(nitp_ops.linear_cross_entropy, labels, fused), inputs, upstream)
    exact = outputs(
        token.call(reference.linear_cross_entropy, labels, options), widened(inputs), upstream
    )
    near(ours, exact, ["loss", "d hidden", "d unembedding", "d bias"])
    assert [x.dtype for x in ours[1:]] == [x.dtype for x in inputs]


@BACKENDS
@given(problem=token.problems(), overwrite=st.booleans())
def test_cross_entropy_of_logits_equals_the_reference(backend, problem, overwrite):
    (hidden, weight, *bias), labels, options, upstream, _ = problem
    inputs = [moved((hidden @ weight.T).detach().requires_grad_()), *map(moved, bias)]
    labels, options, upstream = moved(labels), on_gpu(options), moved(upstream)
    fused = {**options, "inplace_gradient": overwrite, "backend": served(backend)}
    ours = outputs(
        lambda x, b=None: nitp_ops.cross_entropy(x * 1, labels, bias=b, **fused), inputs, upstream
    )
    exact = outputs(
        lambda x, b=None: reference.cross_entropy(x, labels, bias=b, **options),
        widened(inputs),
        upstream,
    )
    near(ours, exact, ["loss", "d logits", "d bias"])


@BACKENDS
@given(problem=latent.problems())
def test_implicit_token_loss_equals_the_reference(backend, problem):
    inputs, options, upstream, chunk = problem
    inputs, options, upstream = [moved(x) for x in inputs], on_gpu(options), moved(upstream)
    fused = {**options, "chunk_bytes": chunk, "backend": served(backend)}
    ours = outputs(latent.call(nitp_ops.implicit_token_loss, fused), inputs, upstream)
    latent.near_the_reference(ours, inputs, options, upstream)
    assert [x.dtype for x in ours[1:]] == [x.dtype for x in inputs if x.requires_grad]


@BACKENDS
@given(
    dtype=st.sampled_from(DTYPES), distance=st.sampled_from(DISTANCES), rows=st.integers(0, 5),
    width=st.integers(1, 300), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_alignment_and_swiglu_equal_the_reference(backend, dtype, distance, rows, width, seed):
    inputs = [normal(2, rows, width, seed=seed + i, dtype=dtype).requires_grad_() for i in range(2)]
    upstream = normal(2, rows, seed=seed + 2, dtype=reference.working(*inputs))
    ours = outputs(
        partial(nitp_ops.alignment, distance=distance, backend=served(backend)), inputs, upstream
    )
    near(
        ours,
        outputs(
            partial(reference.alignment, distance=distance), widened(inputs), upstream.double()
        ),
    )
    upstream = normal(2, rows, width, seed=seed + 3, dtype=dtype)
    ours = outputs(partial(nitp_ops.swiglu, backend=backend), inputs, upstream)
    near(ours, outputs(reference.swiglu, widened(inputs), upstream.double()))


@BACKENDS
@NARROW
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logit_scale": 0.5, "label_smoothing": 0.1, "z_loss": 1e-3},
        {"softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-3},
    ],
)
# clusters of 2, 4 and 8, and rows that no cluster holds
@pytest.mark.parametrize("vocabulary", [80000, 128256, 151936, 256000, 500001, 1200003])
def test_cross_entropy_over_rows_longer_than_a_block_holds(backend, dtype, options, vocabulary):
    hidden, weight = (
        normal(40, 16, dtype=dtype),
        normal(vocabulary, 16, seed=1, scale=0.5, dtype=dtype),
    )
    inputs, labels = (
        [hidden.requires_grad_(), weight.requires_grad_()],
        torch.arange(40, device=DEVICE),
    )
    labels[1], labels[2] = -100, vocabulary - 1
    fused = {**options, "backend": served(backend)}
    ours = outputs(lambda h, w: nitp_ops.linear_cross_entropy(h, w, labels, **fused), inputs, 1.0)
    exact = outputs(
        lambda h, w: reference.linear_cross_entropy(h, w, labels, **options), widened(inputs), 1.0
    )
    near(ours, exact, ["loss", "d hidden", "d unembedding"])


@BACKENDS
@NARROW
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_rows", [64, 300, 777])
def test_cross_entropy_keeps_the_error_budget_at_any_number_of_chunks(
    backend, dtype, reduction, chunk_rows
):
    hidden, weight = (
        normal(777, 192, dtype=dtype),
        normal(5003, 192, seed=1, scale=192**-0.5, dtype=dtype),
    )
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    labels = torch.randint(0, 5003, (777,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    labels[::7] = -100
    upstream = normal(777, seed=3) if reduction == "none" else 1.0
    fused = {
        "reduction": reduction,
        "chunk_bytes": chunk_rows * 5003 * dtype.itemsize,
        "backend": served(backend),
    }
    ours = outputs(
        lambda h, w: nitp_ops.linear_cross_entropy(h, w, labels, **fused), inputs, upstream
    )
    # of the eager formula in the logits' dtype; its loss in float32, as the op returns it
    eager = outputs(
        lambda h, w: F.cross_entropy(F.linear(h, w).float(), labels, reduction=reduction),
        inputs,
        upstream,
    )
    exact = outputs(
        lambda h, w: reference.linear_cross_entropy(h, w, labels, reduction=reduction),
        widened(inputs),
        upstream,
    )
    within_budget(ours, eager, exact)


@BACKENDS
@NARROW
@pytest.mark.parametrize("chunk_bytes", [None, 100_000])
def test_implicit_token_loss_keeps_the_error_budget(backend, dtype, chunk_bytes):
    made = [normal(2, 200, 64, dtype=dtype), normal(2, 200, 64, seed=1, dtype=dtype)]
    made += [
        normal(*s, seed=2 + i, scale=s[-1] ** -0.5, dtype=dtype)
        for i, s in enumerate([(256, 64)] * 2 + [(64, 256)])
    ]
    inputs = [x.requires_grad_(place != 1) for place, x in enumerate(made)]

    def eager(hidden, target, gate, up, down, reduction):
        prediction = F.linear(F.silu(F.linear(hidden, gate)) * F.linear(hidden, up), down)[:, :-1]
        loss = 1 - F.cosine_similarity(prediction.float(), target[:, 1:].float(), dim=-1)
        return loss.mean() if reduction == "mean" else F.pad(loss, (0, 1))

    # the loss of every pair: in their mean, errors of either sign cancel by chance
    def each(loss, tensors):
        return [
            loss(*tensors, reduction="none").detach(),
            *outputs(partial(loss, reduction="mean"), tensors)[1:],
        ]

    fused = partial(nitp_ops.implicit_token_loss, chunk_bytes=chunk_bytes, backend=served(backend))
    exact = each(reference.implicit_token_loss, widened(inputs))
    within_budget(each(fused, inputs), each(eager, inputs), exact)


@BACKENDS
def test_float32_logits_under_bfloat16_weights_are_exact_products_of_them(backend):
    inputs = [normal(60, 32, dtype=torch.bfloat16).requires_grad_()]
    inputs.append(normal(501, 32, seed=1, dtype=torch.bfloat16).requires_grad_())
    labels = torch.arange(60, device=DEVICE)
    fused = {"logits_dtype": torch.float32, "chunk_bytes": 25 * 501 * 4, "backend": served(backend)}
    loss = outputs(lambda h, w: nitp_ops.linear_cross_entropy(h, w, labels, **fused), inputs)[0]
    exact = outputs(lambda h, w: reference.linear_cross_entropy(h, w, labels), widened(inputs))[0]
    close(loss, exact, 1e-5)


@BACKENDS
@EVERY_CALL
def test_a_gpu_and_the_cpu_agree_in_float64(backend, name):
    labels, target = labels_and_target()
    inputs = tensors(torch.float64)
    there = outputs(calls(served(backend), labels, target.double())[name], inputs, 0.37)
    here = [x.detach().cpu().requires_grad_() for x in inputs]
    exact = outputs(calls("native", labels.cpu(), target.double().cpu())[name], here, 0.37)
    for a, b in zip(there, exact, strict=True):
        close(a.cpu(), b, 1e-10)


@BACKENDS
def test_statistics_of_a_row_are_those_of_the_reference(backend):
    hidden, weight, *_ = tensors(torch.float64)
    labels, _ = labels_and_target()
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0, "return_stats": "entropy"}
    _, ours = nitp_ops.linear_cross_entropy(
        hidden, weight, labels, backend=served(backend), chunk_bytes=9000, **options
    )
    _, exact = nitp_ops.linear_cross_entropy(hidden, weight, labels, backend="reference", **options)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@BACKENDS
def test_buffers_take_the_gradients_with_the_upstream(backend):
    hidden, weight, *_ = tensors(torch.bfloat16)
    labels, _ = labels_and_target()
    loss = partial(nitp_ops.linear_cross_entropy, labels=labels, backend=served(backend))
    expected = torch.autograd.grad(3 * loss(hidden, weight), (hidden, weight))
    buffers = [torch.ones(x.shape, device=DEVICE) for x in (hidden, weight)]
    fused = loss(hidden, weight, hidden_grad_out=buffers[0], weight_grad_out=buffers[1])
    (3 * fused).backward()
    for buffer, gradient in zip(buffers, expected, strict=True):
        close(buffer - 1, gradient, 1e-2)
    assert hidden.grad is None and weight.grad is None


@BACKENDS
def test_strided_hidden_states_give_the_same_numbers(backend):
    _, weight, *_ = tensors(torch.float64)
    labels, _ = labels_and_target()
    wide = normal(37, 2, 48, dtype=torch.float64)
    strided = wide.transpose(0, 1)[..., 12:36].detach().requires_grad_()
    dense = strided.detach().contiguous().requires_grad_()
    loss = partial(
        nitp_ops.linear_cross_entropy, labels=labels, chunk_bytes=9000, backend=served(backend)
    )
    for a, b in zip(outputs(loss, [strided, weight]), outputs(loss, [dense, weight]), strict=True):
        close(a, b)


@BACKENDS
def test_retained_graphs_and_any_upstream_agree(backend):
    hidden, weight, *_ = tensors(torch.float64)
    labels, _ = labels_and_target()
    for reduction in ("mean", "none"):
        options: dict[str, Any] = {"reduction": reduction, "backend": served(backend)}
        loss = nitp_ops.linear_cross_entropy(hidden, weight, labels, **options).sum()
        first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        second = torch.autograd.grad(loss * 3, (hidden, weight), retain_graph=True)
        third = torch.autograd.grad(loss, (hidden, weight))
        for a, b, c in zip(first, second, third, strict=True):
            close(b, 3 * a)
            close(c, a)
