"""A call takes the plain autograd.Function or, where somebody watches, the custom op: with the same
bits."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import nitp_ops
from nitp_ops.core.dispatch import needs_dispatcher


class Watch(TorchDispatchMode):
    """Changes nothing and notes the names of this library's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "nitp_ops":
            self.seen.append(func._schema.name.partition("::")[2])
        return func(*args, **kwargs or {})


class Subclass(torch.Tensor):
    pass


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def tokens(dtype: torch.dtype, **options):
    hidden, weight, bias = (
        leaf(3, 7, 8, dtype=dtype),
        leaf(33, 8, dtype=dtype),
        leaf(33, dtype=dtype),
    )
    labels = torch.randint(0, 33, (3, 7))
    labels[0, :3] = -100
    call = nitp_ops.linear_cross_entropy
    return (hidden, weight, bias), lambda: call(
        hidden, weight, labels, bias=bias, return_stats=True, **options
    )


def latents(dtype: torch.dtype, **options):
    hidden, target = leaf(3, 7, 8, dtype=dtype), torch.randn(3, 7, 8).to(dtype)
    projector = leaf(12, 8, dtype=dtype), leaf(12, 8, dtype=dtype), leaf(8, 12, dtype=dtype)
    call = nitp_ops.implicit_token_loss
    return (hidden, *projector), lambda: call(
        hidden, target, *projector, return_stats=True, **options
    )


def shared(dtype: torch.dtype, **options):
    first, second, weight = (
        leaf(9, 8, dtype=dtype),
        leaf(5, 8, dtype=dtype),
        leaf(33, 8, dtype=dtype),
    )
    jobs = [
        nitp_ops.CrossEntropyTerm(x, torch.randint(0, 33, (len(x),)), **options)
        for x in (first, second)
    ]

    def call():
        loss, stats = nitp_ops.grouped_linear_cross_entropy(jobs, weight)
        return loss, [field for of_job in stats for field in of_job]

    return (first, second, weight), call


def logits(dtype: torch.dtype, **options):
    given, bias, labels = (
        leaf(3, 7, 33, dtype=dtype),
        leaf(33, dtype=dtype),
        torch.randint(0, 33, (3, 7)),
    )
    call = nitp_ops.cross_entropy
    return (given, bias), lambda: call(given * 1, labels, bias=bias, return_stats=True, **options)


def pairs(dtype: torch.dtype):
    prediction, target = leaf(3, 7, 8, dtype=dtype), leaf(3, 7, 8, dtype=dtype)
    return (prediction, target), lambda: (nitp_ops.alignment(prediction, target), ())


def gates(dtype: torch.dtype):
    gate, up = leaf(3, 7, 8, dtype=dtype), leaf(3, 7, 8, dtype=dtype)
    return (gate, up), lambda: (nitp_ops.swiglu(gate, up), ())


CASES = {
    "tokens": lambda dtype: tokens(
        dtype, label_smoothing=0.1, z_loss=0.01, softcap=5.0, chunk_bytes=600
    ),
    "tokens, none": lambda dtype: tokens(dtype, reduction="none"),
    "latents": lambda dtype: latents(dtype, chunk_bytes=600),
    "latents, none": lambda dtype: latents(dtype, reduction="none"),
    "shared": lambda dtype: shared(dtype, z_loss=0.01),
    "logits": lambda dtype: logits(dtype, label_smoothing=0.1),
    "logits, none": lambda dtype: logits(dtype, reduction="none"),
    "pairs": pairs,
    "gates": gates,
}
OPS = {"token_pass", "latent_pass", "cross_entropy", "alignment", "swiglu"}
FUNCTIONS = {"LinearCrossEntropy", "ImplicitTokenLoss", "CrossEntropy", "Alignment", "Swiglu"}


def results(leaves, call) -> list[torch.Tensor]:
    """Loss, stats, and the gradients of two backward passes under different upstream gradients."""
    loss, stats = call()
    found = [loss.detach(), *stats]
    for factor in (1.0, 0.37):
        found += torch.autograd.grad(loss, leaves, torch.full_like(loss, factor), retain_graph=True)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_both_ways_give_the_same_bits(case, dtype):
    leaves, call = CASES[case](dtype)
    plain = results(leaves, call)
    with Watch() as watch:
        watched = results(leaves, call)
    assert OPS & set(watch.seen)
    for ours, theirs in zip(plain, watched, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours.nan_to_num(), theirs.nan_to_num())


@pytest.mark.parametrize("case", CASES)
def test_a_plain_call_has_a_function_of_its_name_and_no_custom_op(case):
    _, call = CASES[case](torch.float32)
    with torch.profiler.profile() as profile:
        loss, _ = call()
    names = {event.name for event in profile.events() or ()}
    assert not names & {f"nitp_ops::{op}" for op in OPS}
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        seen.add(node.name())
        nodes += [each for each, _ in node.next_functions if each is not None]
    assert seen & {f"{name}FunctionBackward" for name in FUNCTIONS}


@pytest.mark.parametrize("case", CASES)
def test_a_double_backward_is_refused_by_name_both_ways(case):
    leaves, call = CASES[case](torch.float64)

    def twice() -> None:
        loss, _ = call()
        first = torch.autograd.grad(loss.sum(), leaves[0], create_graph=True)[0]
        first.square().sum().backward()

    for way in (torch.enable_grad(), Watch()):
        with way, pytest.raises(NotImplementedError, match="double backward"):
            twice()


def test_a_gradient_in_place_has_the_same_bits_both_ways():
    leaves, call = logits(torch.float32, inplace_gradient=True)
    plain = torch.autograd.grad(call()[0], leaves)
    with Watch():
        watched = torch.autograd.grad(call()[0], leaves)
    assert plain[0].shape == leaves[0].shape and all(map(torch.equal, plain, watched))


@pytest.mark.parametrize("case", CASES)
def test_a_pass_that_starts_plain_may_end_watched(case):
    leaves, call = CASES[case](torch.float32)
    expected = torch.autograd.grad(call()[0].sum(), leaves)
    loss = call()[0].sum()
    with Watch():
        found = torch.autograd.grad(loss, leaves)
    assert all(map(torch.equal, expected, found))


def test_whoever_watches_is_seen():
    answers = []

    def ask(x: torch.Tensor) -> torch.Tensor:
        answers.append(needs_dispatcher([x, None]))
        return x + 1

    x = torch.ones(2)
    ask(x)
    ask(torch.nn.Parameter(x))
    assert answers == [False, False]
    answers.clear()
    with Watch():
        ask(x)
    with FakeTensorMode():
        ask(torch.ones(2))
    ask(torch.ones(2).as_subclass(Subclass))
    ask(torch.ones(2, device="meta"))
    make_fx(ask)(x)
    torch.func.functionalize(ask)(x)
    torch.vmap(ask)(x)
    torch.func.grad(lambda y: ask(y).sum())(x)
    with warnings.catch_warnings():  # it is deprecated, and still used
        warnings.simplefilter("ignore")
        torch.jit.trace(ask, x, check_trace=False)
    assert len(answers) == 9 and all(answers)
