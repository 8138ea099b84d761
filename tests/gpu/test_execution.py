"""On a GPU no op waits for the device; all can be captured, compiled, repeated bit by bit, within
their memory."""

import gc
from contextlib import contextmanager

import pytest
import torch

import nitp_ops
from tests.gpu.gpu_cases import (
    BACKENDS,
    DEVICE,
    EVERY_CALL,
    ON_GPU,
    calls,
    labels_and_target,
    normal,
    served,
    tensors,
)
from tests.support.budget import close, outputs

pytestmark = ON_GPU


@contextmanager
def waiting_forbidden():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@BACKENDS
@EVERY_CALL
def test_forward_and_backward_never_wait_for_the_device(backend, name):
    inputs, (labels, target) = tensors(), labels_and_target()
    call = calls(served(backend), labels, target)[name]
    upstream = torch.tensor(0.37, device=DEVICE)
    # loads modules, compiles, sets up cuBLAS: all of which may wait
    outputs(call, inputs, upstream)
    with waiting_forbidden():
        outputs(call, inputs, upstream)


def test_the_guard_against_waiting_sees_a_read_of_a_value():
    with waiting_forbidden(), pytest.raises(RuntimeError, match="synchronizing"):
        normal(3).sum().item()


@BACKENDS
@EVERY_CALL
def test_a_captured_step_replays_with_new_values(backend, name):
    inputs, (labels, target) = tensors(), labels_and_target()
    call = calls(served(backend), labels, target)[name]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            outputs(call, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs(call, inputs)
    # other values, and another number of ignored rows
    new_labels, new_target = labels_and_target(seed=5, ignored=0.6)
    with torch.no_grad():
        for x, new in zip(inputs, tensors(seed=77), strict=True):
            x.copy_(new)
        labels.copy_(new_labels)
        target.copy_(new_target)
    graph.replay()
    fresh = outputs(calls(backend, new_labels, new_target)[name], tensors(seed=77))
    for a, b in zip(captured, fresh, strict=True):
        close(a, b, 1e-5)


@BACKENDS
@EVERY_CALL
def test_torch_compile_in_one_graph_equals_eager(backend, name):
    torch.use_deterministic_algorithms(False)
    inputs, (labels, target) = tensors(), labels_and_target()
    call = calls(served(backend), labels, target)[name]
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True)
    for a, b in zip(outputs(compiled, inputs, 0.37), outputs(call, inputs, 0.37), strict=True):
        close(a, b, 1e-5)


@BACKENDS
@EVERY_CALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_bitwise_the_same_every_time(backend, name, dtype):
    inputs, (labels, target) = tensors(dtype), labels_and_target()
    call = calls(served(backend), labels, target)[name]
    first = outputs(call, inputs, 0.37)
    for again in range(3):
        # other addresses, other leftovers
        held = torch.full((1 + again * 10007,), 7.0, device=DEVICE)
        for a, b in zip(outputs(call, inputs, 0.37), first, strict=True):
            assert torch.equal(a, b)
        del held


@BACKENDS
def test_many_rows_of_a_large_vocabulary_are_bitwise_the_same_every_time(backend):
    inputs = [normal(1500, 128, dtype=torch.bfloat16).requires_grad_()]
    inputs.append(normal(50257, 128, seed=1, scale=0.1, dtype=torch.bfloat16).requires_grad_())
    labels = torch.arange(1500, device=DEVICE) % 11  # every class many times
    fused = {"chunk_bytes": 400 * 50257 * 2, "backend": served(backend)}

    def step():
        return outputs(lambda h, w: nitp_ops.linear_cross_entropy(h, w, labels, **fused), inputs)

    first = step()
    for _ in range(3):
        for a, b in zip(step(), first, strict=True):
            assert torch.equal(a, b)


def peak(step) -> int:
    """Most bytes allocated in a step beyond those before it."""
    step()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


@BACKENDS
def test_the_memory_of_cross_entropy_does_not_grow_with_the_rows(backend):
    weight = normal(20000, 64, scale=0.1, dtype=torch.bfloat16).requires_grad_()
    chunk_bytes = 256 * 20000 * 2

    def step(rows):
        hidden, labels = (
            normal(rows, 64, dtype=torch.bfloat16),
            torch.zeros(rows, dtype=torch.int64, device=DEVICE),
        )
        fused = {"chunk_bytes": chunk_bytes, "backend": served(backend)}
        return lambda: outputs(
            lambda w: nitp_ops.linear_cross_entropy(hidden, w, labels, **fused), [weight]
        )

    few, many = peak(step(1024)), peak(step(8192))
    assert few > chunk_bytes  # the counter counts
    # values a row (loss, log-sum-exp, prediction, weights, indices): 128 bytes; logits would be
    # 40000
    assert many - few <= 7168 * 128 + 2**20
    assert many < 8192 * 20000 * 2 / 2


@BACKENDS
def test_the_memory_of_implicit_token_loss_does_not_grow_with_the_rows(backend):
    weights = [
        normal(*s, scale=0.1, dtype=torch.bfloat16).requires_grad_()
        for s in [(1024, 256)] * 2 + [(256, 1024)]
    ]
    chunk_bytes = 512 * (3 * 1024 + 3 * 256) * 2

    def step(rows):
        hidden, target = (normal(rows, 256, seed=i, dtype=torch.bfloat16) for i in range(2))
        fused = {"chunk_bytes": chunk_bytes, "backend": served(backend)}
        return lambda: outputs(
            lambda *w: nitp_ops.implicit_token_loss(hidden, target, *w, **fused), weights
        )

    few, many = peak(step(2048)), peak(step(16384))
    assert few > chunk_bytes / 2
    assert many - few <= 14336 * 128 + 2**20
