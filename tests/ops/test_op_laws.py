"""What every public op promises to PyTorch: registration, compilation, autocast, refusals."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import nitp_ops
from nitp_ops.core import gemm
from tests.support.budget import close, outputs

torch._dynamo.config.cache_size_limit = 64


def tensors(dtype=torch.float32):
    hidden = torch.randn(2, 5, 6, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 6, dtype=dtype, requires_grad=True)
    gate, up = (torch.randn(8, 6, dtype=dtype, requires_grad=True) for _ in range(2))
    down = torch.randn(6, 8, dtype=dtype, requires_grad=True)
    return hidden, weight, gate, up, down


LABELS = torch.tensor([[1, 2, -100, 4, 10], [0, -100, -100, 3, 5]])
EVERY_ROW = LABELS.where(LABELS >= 0, 7)
TARGET = torch.linspace(-1, 1, 60).sin().view(2, 5, 6)


def calls(labels=LABELS):
    for reduction in ("mean", "none"):
        yield (
            f"linear_cross_entropy-{reduction}",
            lambda h, w, g, u, d, r=reduction: nitp_ops.linear_cross_entropy(
                h, w, labels, reduction=r
            ),
        )
        yield (
            f"implicit_token_loss-{reduction}",
            lambda h, w, g, u, d, r=reduction: nitp_ops.implicit_token_loss(
                h, TARGET.to(h.dtype), g, u, d, reduction=r
            ),
        )
        yield (
            f"cross_entropy-{reduction}",
            lambda h, w, g, u, d, r=reduction: nitp_ops.cross_entropy(
                h, labels.clamp(max=5), bias=w[0], reduction=r, z_loss=0.1, return_stats=True
            )[0],
        )
    yield (
        "linear_cross_entropy-weighted-targets",
        lambda h, w, g, u, d: nitp_ops.linear_cross_entropy(
            h,
            w,
            torch.stack([labels, labels.flip(0)], -1),
            target_weight=torch.full((2, 5, 2), 0.5),
            z_loss=0.1,
        ),
    )
    yield (
        "linear_cross_entropy-class-weights",
        lambda h, w, g, u, d: nitp_ops.linear_cross_entropy(
            h, w, labels, class_weight=torch.linspace(0, 1, 11), label_smoothing=0.1, softcap=3.0
        ),
    )
    yield "alignment", lambda h, w, g, u, d: nitp_ops.alignment(h, TARGET.to(h.dtype))
    yield "swiglu", lambda h, w, g, u, d: nitp_ops.swiglu(h, h.sin())
    yield (
        "grouped_linear_cross_entropy",
        lambda h, w, g, u, d: nitp_ops.grouped_linear_cross_entropy(
            [
                nitp_ops.CrossEntropyTerm(h, labels, token_weight=torch.tensor(0.1)),
                nitp_ops.CrossEntropyTerm(h * 2, labels),
            ],
            w,
        )[0],
    )


EVERY = pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in calls()])


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in calls(EVERY_ROW)])
def test_opcheck_accepts_the_registration(call):
    """Runs torch.library.opcheck on every custom op that the call reaches, forward and backward."""
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "nitp_ops" and not func._schema.name.endswith(("rows", "rows_")):
                seen.append((func, args))
            return func(*args, **(kwargs or {}))

    # opcheck compares runs; NaN-filled memory is not its subject
    torch.use_deterministic_algorithms(False)
    inputs = tensors()
    with Recorder():
        loss = call(*inputs)
        forward_ops = len(seen)
        wanted = [x for x in inputs if x.requires_grad]
        torch.autograd.grad((loss * 0.37).sum(), wanted, allow_unused=True, create_graph=True)
    assert 0 < forward_ops < len(seen)
    for place, (func, args) in enumerate(seen):
        # a backward op refuses to be differentiated: checked without
        def fresh(x, forward=place < forward_ops):
            return x.detach().requires_grad_(forward and x.requires_grad)

        torch.library.opcheck(func, tree_map_only(torch.Tensor, fresh, args))


@EVERY
def test_saved_tensors_may_be_mutated_around_a_call(call):
    """In the context PyTorch looks up every argument that a schema says is written, also one that
    is left out."""
    inputs = tensors()
    wanted = outputs(call, inputs, 0.37)
    with allow_mutation_on_saved_tensors():
        got = outputs(call, inputs, 0.37)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@EVERY
def test_torch_compile_fullgraph_equals_eager(call):
    torch.use_deterministic_algorithms(False)
    inputs = tensors()
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True)
    for a, b in zip(outputs(compiled, inputs, 0.37), outputs(call, inputs, 0.37), strict=True):
        close(a, b, 1e-6)


def test_a_compiled_backward_adds_into_the_buffers():
    torch.use_deterministic_algorithms(False)
    hidden, weight, gate, up, down = tensors()
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def loss(hidden, weight, for_hidden, for_weight):
        token = nitp_ops.linear_cross_entropy(
            hidden, weight, LABELS, hidden_grad_out=for_hidden, weight_grad_out=for_weight
        )
        return token + nitp_ops.implicit_token_loss(
            hidden, TARGET, gate, up, down, hidden_grad_out=for_hidden
        )

    for_hidden, for_weight = torch.ones_like(hidden).detach(), torch.ones_like(weight).detach()
    loss(hidden, weight, for_hidden, for_weight).backward()
    plain = nitp_ops.linear_cross_entropy(hidden, weight, LABELS)
    plain = plain + nitp_ops.implicit_token_loss(hidden, TARGET, gate, up, down)
    for buffer, gradient in zip(
        (for_hidden, for_weight), torch.autograd.grad(plain, (hidden, weight)), strict=True
    ):
        close(buffer - 1, gradient, 1e-6)
    assert hidden.grad is None and weight.grad is None and gate.grad is not None


@EVERY
def test_double_backward_is_refused_by_name(call):
    inputs = tensors(torch.float64)
    loss = call(*inputs).sum()
    wanted = [x for x in inputs if x.requires_grad]
    gradients = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(
            torch.stack([g.square().sum() for g in gradients if g is not None]).sum(),
            wanted,
            allow_unused=True,
        )


@EVERY
def test_the_reference_backend_gives_the_same_numbers(call, monkeypatch):
    inputs = tensors(torch.float64)
    native = outputs(call, inputs)
    monkeypatch.setattr(nitp_ops.kernels.select, "select_backend", lambda *_: "reference")
    for a, b in zip(native, outputs(call, inputs), strict=True):
        close(a, b)


def test_autocast_decides_the_gemm_dtype_and_gradients_keep_their_inputs_dtype():
    hidden, weight, gate, up, down = tensors()
    bias = torch.randn(11, requires_grad=True)
    dtype = torch.float32 if torch.bfloat16 in gemm._WITHOUT_GEMM else torch.bfloat16
    half = [x.detach().to(dtype) for x in (hidden, weight, gate, up, down)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nitp_ops.linear_cross_entropy(hidden, weight, LABELS, bias=bias)
        latent = nitp_ops.implicit_token_loss(hidden, TARGET, gate, up, down)
    assert loss.dtype == latent.dtype == torch.float32
    assert torch.equal(loss, nitp_ops.linear_cross_entropy(half[0], half[1], LABELS, bias=bias))
    assert torch.equal(latent, nitp_ops.implicit_token_loss(half[0], TARGET, *half[2:]))
    gradients = torch.autograd.grad(loss + latent, (hidden, weight, gate, up, down, bias))
    assert all(g.dtype == torch.float32 for g in gradients)


def test_without_the_library_torch_serves_and_native_is_refused_with_every_reason(monkeypatch):
    monkeypatch.setattr(
        nitp_ops.kernels.select, "load_error", "the compiled library does not load: no such symbol"
    )
    assert nitp_ops.swiglu(torch.ones(2), torch.ones(2)).shape == (2,)
    with pytest.raises(
        nitp_ops.BackendError,
        match=r"native: the compiled library does not "
        r"load.*reference: only on",
    ):
        nitp_ops.swiglu(torch.ones(2), torch.ones(2), backend="native")


def test_other_devices_have_no_compiled_kernels(monkeypatch):
    monkeypatch.setattr(nitp_ops.kernels.select, "load_error", None)
    meta = torch.empty(2, 3, device="meta")
    assert nitp_ops.swiglu(meta, meta).shape == (2, 3)
    refusal = nitp_ops.kernels.select.unavailable_reason(torch.device("xpu"))
    assert refusal == "no compiled row kernels for xpu tensors"


@EVERY
def test_activation_checkpointing_changes_nothing(call):
    inputs = tensors(torch.float64)
    plain = outputs(call, inputs, 0.37)
    checkpointed = outputs(lambda *x: checkpoint(call, *x, use_reentrant=False), inputs, 0.37)
    for a, b in zip(checkpointed, plain, strict=True):
        assert torch.equal(a, b)


@EVERY
def test_forward_mode_is_refused_by_name(call):
    inputs = [x.detach() for x in tensors()]
    tangents = [torch.ones_like(x) for x in inputs]
    with pytest.raises(
        NotImplementedError,
        match=r"torch.func transform .* is not supported, expected reverse mode",
    ):
        torch.func.jvp(call, tuple(inputs), tuple(tangents))
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="forward-mode differentiation is not supported"),
    ):
        call(*(forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)))


def test_double_backward_through_the_upstream_of_none_is_refused_by_name():
    hidden, weight, *_ = tensors(torch.float64)
    scale = torch.full((2, 5), 2.0, dtype=torch.float64, requires_grad=True)
    loss = (scale * nitp_ops.linear_cross_entropy(hidden, weight, LABELS, reduction="none")).sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(gradient.sum(), scale)


def test_fake_tensors_pass_the_doors():
    with FakeTensorMode():
        hidden, weight = torch.empty(3, 6), torch.empty(11, 6)
        loss = nitp_ops.linear_cross_entropy(hidden, weight, torch.zeros(3, dtype=torch.int64))
    assert loss.shape == ()


def test_vmap_is_refused_by_name():
    hidden, weight, gate, up, down = (x.detach() for x in tensors())
    for wrong in (
        lambda h: nitp_ops.linear_cross_entropy(h, weight, EVERY_ROW[0]),
        lambda h: nitp_ops.cross_entropy(h, torch.zeros(5, dtype=torch.int64)),
        lambda h: nitp_ops.implicit_token_loss(h, h, gate, up, down),
        lambda h: nitp_ops.swiglu(h, h),
        lambda h: nitp_ops.alignment(h, h),
    ):
        with pytest.raises(NotImplementedError, match="vmap"):
            torch.vmap(wrong)(hidden)


def test_float16_autocast_runs_in_float32_on_cpu():
    hidden, weight, *_ = tensors()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = nitp_ops.linear_cross_entropy(hidden, weight, LABELS)
    assert torch.equal(loss, nitp_ops.linear_cross_entropy(hidden, weight, LABELS))
