"""weight_grad_out of a call of one chunk: the third GEMM runs in the backward pass and adds into
the buffer."""

import warnings

import pytest
import torch
from torch._dynamo import compiled_autograd

import nitp_ops
from nitp_ops import reference
from nitp_ops.core import gemm, weight_gradient
from nitp_ops.ops import gradients
from tests.support.budget import EPS

N, D, V = 24, 64, 96
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
NAN = float("nan")


@pytest.fixture
def ran(monkeypatch):
    """The operands of every such GEMM; other sums of a weight gradient are an error."""
    seen = []
    run = weight_gradient.WeightGemm.run

    def noted(self, upstream, kernels):
        seen.append(self.operands)
        run(self, upstream, kernels)

    monkeypatch.setattr(weight_gradient.WeightGemm, "run", noted)
    return seen


def case(dtype: torch.dtype, rows: int = N):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, D).to(dtype).requires_grad_() for n in (rows, V))
    labels = torch.randint(0, V, (rows,))
    labels[::5] = -100
    work = reference.working(weight)
    return hidden, weight, labels, torch.randn(V, D, dtype=work)


def waits(dtype: torch.dtype) -> bool:
    """Whether a GEMM of such operands can add into a float32 sum here."""
    return gemm.GemmPolicy.of(torch.device("cpu"), dtype).out_dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )


def exact(hidden, weight, labels, upstream: float) -> list[torch.Tensor]:
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = reference.linear_cross_entropy(h, w, labels)
    return list(torch.autograd.grad(loss * upstream, (h, w)))


@pytest.mark.parametrize("upstream", [1.0, 0.37])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_buffer_takes_the_gradient_twice_within_the_error_budget(ran, dtype, upstream):
    hidden, weight, labels, buffer = case(dtype)
    started, (of_hidden, of_weight) = buffer.clone(), exact(hidden, weight, labels, upstream)
    loss = nitp_ops.linear_cross_entropy(hidden, weight, labels, weight_grad_out=buffer)
    eager = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels)
    rough = [
        g.double()
        for g in torch.autograd.grad(eager, (hidden, weight), torch.tensor(upstream, dtype=dtype))
    ]
    for times in (1, 2):
        (loss * upstream).backward(retain_graph=True)
        assert weight.grad is None
        error = (buffer.double() - started.double() - times * of_weight).norm()
        allowed = 1.5 * times * (rough[1] - of_weight).norm()
        size = buffer.double().norm() + times * of_weight.norm()
        # float64: of both
        assert error <= allowed + (8 if dtype == torch.float64 else 2) * EPS[buffer.dtype] * size
    assert hidden.grad is not None
    within = 3 * (rough[0] - of_hidden).norm() + 4 * EPS[dtype] * of_hidden.norm()
    assert (hidden.grad.double() - 2 * of_hidden).norm() <= within
    assert len(ran) == (2 if waits(dtype) else 0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_upstream_of_zero_adds_nothing_whatever_it_meets(ran, reduction):
    hidden, weight, labels, buffer = case(torch.float32)
    with torch.no_grad():
        hidden[3] = NAN
    started = buffer.clone()
    call = nitp_ops.linear_cross_entropy
    loss = call(hidden, weight, labels, weight_grad_out=buffer, reduction=reduction)
    loss.backward(torch.zeros_like(loss))
    assert torch.equal(buffer, started) and len(ran) == 1


def test_rows_without_weight_reach_nothing(ran):
    hidden, weight, labels, buffer = case(torch.float32)
    started, token_weight = buffer.clone(), torch.ones(N)
    call = nitp_ops.linear_cross_entropy
    token_weight[[0, 3]] = 0.0  # an ignored row and one with a label
    expected = torch.autograd.grad(call(hidden, weight, labels, token_weight=token_weight), weight)[
        0
    ]
    with torch.no_grad():
        hidden[[0, 3]] = torch.tensor([[NAN], [float("inf")]])
    call(hidden, weight, labels, token_weight=token_weight, weight_grad_out=buffer).backward()
    torch.testing.assert_close(buffer - started, expected, atol=1e-6, rtol=0)
    assert len(ran) == 1


def test_a_call_without_a_row_that_counts_adds_nothing():
    hidden, weight, _, buffer = case(torch.float32)
    started = buffer.clone()
    for label, token_weight in ((-100, None), (0, torch.zeros(N))):
        labels = torch.full((N,), label)
        loss = nitp_ops.linear_cross_entropy(
            hidden, weight, labels, weight_grad_out=buffer, token_weight=token_weight
        )
        loss.backward()
    assert torch.equal(buffer, started)


def test_no_gradient_of_the_weight_is_formed(ran, monkeypatch):
    def refuse(*given, **options):
        raise AssertionError("a weight gradient was formed or added")

    monkeypatch.setattr(weight_gradient.WeightGradient, "__init__", refuse)
    monkeypatch.setattr(gradients, "add_gradients", refuse)
    hidden, weight, labels, buffer = case(torch.float32)
    nitp_ops.linear_cross_entropy(hidden, weight, labels, weight_grad_out=buffer).backward()
    jobs = [
        nitp_ops.CrossEntropyTerm(hidden[: N // 2], labels[: N // 2]),
        nitp_ops.CrossEntropyTerm(hidden[N // 2 :], labels[N // 2 :]),
    ]
    nitp_ops.grouped_linear_cross_entropy(jobs, weight, weight_grad_out=buffer)[0].backward()
    frozen = hidden.detach()
    nitp_ops.linear_cross_entropy(frozen, weight, labels, weight_grad_out=buffer).backward()
    assert len(ran) == 3


@pytest.mark.parametrize(
    ("dtype", "rows", "options"),
    [
        (torch.float32, N, {"chunk_bytes": 4 * V * 8}),  # several chunks
        (torch.float32, 2 * D, {}),  # the logits would hold more memory than the gradient
    ],
)
def test_where_it_does_not_wait_the_buffer_takes_the_gradient_all_the_same(
    ran, dtype, rows, options
):
    hidden, weight, labels, buffer = case(dtype, rows)
    started, (_, of_weight) = buffer.clone(), exact(hidden, weight, labels, 1.0)
    nitp_ops.linear_cross_entropy(
        hidden, weight, labels, weight_grad_out=buffer, **options
    ).backward()
    assert not ran
    assert (buffer - started - of_weight).norm() <= 4 * EPS[dtype] * (
        of_weight.norm() + started.norm()
    )


def test_float16_waits_in_float32_where_a_gemm_could_add(ran, monkeypatch):
    """As on a GPU: without its upstream the gradient of float16 logits would underflow."""
    monkeypatch.setattr(gemm, "_WITHOUT_GEMM", frozenset())
    policy = gemm.GemmPolicy(torch.device("cpu"), torch.float16, torch.float16, torch.float32)
    monkeypatch.setattr(gemm.GemmPolicy, "of", lambda *given: policy)
    hidden, weight, labels, buffer = case(torch.float16)
    started, (_, of_weight) = buffer.clone(), exact(hidden, weight, labels, 1.0)
    nitp_ops.linear_cross_entropy(
        hidden.detach(), weight, labels, weight_grad_out=buffer
    ).backward()
    assert not ran
    assert (buffer - started - of_weight).norm() <= 4 * EPS[torch.float16] * of_weight.norm()


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_buffer_has_no_graph_under_create_graph(ran, monkeypatch, dtype, own):
    if not own:  # as on a processor that this library has no GEMM for
        monkeypatch.setattr(gemm, "has_native_gemm", lambda device, dtype: False)
    hidden, weight, labels, buffer = case(dtype)
    for _ in range(2):
        loss = nitp_ops.linear_cross_entropy(hidden, weight, labels, weight_grad_out=buffer)
        torch.autograd.grad(loss, hidden, create_graph=True)
        assert not buffer.requires_grad
    assert len(ran) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_backward_pass_calls_it_without_a_warning(dtype):
    hidden, weight, labels, buffer = case(dtype)
    eager = buffer.clone()
    (0.37 * nitp_ops.linear_cross_entropy(hidden, weight, labels, weight_grad_out=eager)).backward()
    loss = 0.37 * nitp_ops.linear_cross_entropy(hidden, weight, labels, weight_grad_out=buffer)
    torch._dynamo.reset()
    with warnings.catch_warnings(), compiled_autograd._enable(torch.compile(backend="eager")):
        warnings.filterwarnings("error", message="Dynamo detected a call to a `functools")
        loss.backward()
    assert torch.equal(buffer, eager)
