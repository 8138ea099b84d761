"""A call moves the bytes that its equations ask for, on the path of a GPU; float32, counted in
numbers."""

from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func

import nitp_ops
from nitp_ops.kernels import select, table
from nitp_ops.objectives import build
from nitp_ops.ops import gradients
from tests.core.without_reading import without_reading
from tests.kernels.bytes_moved import BytesMoved
from tests.support.objectives_cases import INFO, make_batch

N, D, V, M = 64, 48, 304, 96


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).requires_grad_()


def numbers(loss, upstream=1.0, least=N * D):
    """By operator, of the forward pass and of the backward pass."""
    with without_reading():
        with BytesMoved(least) as forward:
            value = loss()
        with BytesMoved(least) as backward:
            value.backward(torch.tensor(upstream))
    return [
        {name: moved // 4 for name, moved in each.moved.items() if moved}
        for each in (forward, backward)
    ]


def gemm(*shapes):
    """Of n x k times k x m: both read, the result written."""
    return sum(n * k + k * m + n * m for n, k, m in shapes)


def split(moved):
    """(numbers of the GEMMs, of the rest by operator)."""
    return moved.pop("gemm_", 0) + moved.pop("mm", 0), moved


@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_a_head_moves_its_gemms_its_logits_twice_and_what_silences_rows(upstream):
    hidden, weight, labels = normal(N, D), normal(V, D), torch.randint(0, V, (N,))
    forward, backward = numbers(
        lambda: nitp_ops.linear_cross_entropy(hidden, weight, labels), upstream
    )
    gemms, rest = split(forward)
    assert gemms == gemm((N, D, V), (N, V, D), (V, N, D))
    assert rest == {
        "cross_entropy_rows_": 2 * N * V,
        "masked_fill": 2 * N * D,
        "masked_fill_": 2 * N * D,
    }
    assert backward == ({} if upstream == 1 else {"scale_rows_": 2 * N * D + 2 * V * D})


def test_the_rows_that_are_left_out_are_all_that_is_filled():
    hidden, weight, labels = normal(2 * N, D), normal(V, D), torch.full((2 * N,), -100)
    labels[:N] = 1
    forward, _ = numbers(lambda: nitp_ops.linear_cross_entropy(hidden, weight, labels, max_rows=N))
    assert (
        not {"zero_", "fill_", "zeros"} & set(forward)
        and forward["index_fill_"] == 2 * hidden.numel()
    )
    assert (
        hidden.grad is not None
        and hidden.grad[:N].abs().sum(1).min() > 0
        and not hidden.grad[N:].any()
    )


def test_a_buffer_takes_its_gradient_in_one_pass():
    hidden, weight, labels, total = (
        normal(N, D),
        normal(V, D),
        torch.randint(0, V, (N,)),
        torch.zeros(V, D),
    )
    _, backward = numbers(
        lambda: nitp_ops.linear_cross_entropy(hidden, weight, labels, weight_grad_out=total), 0.5
    )
    assert backward == {"scale_rows_": 2 * N * D, "accumulate_rows_": 3 * V * D}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_compiled_backward_reads_and_writes_each_gradient_once(dtype):
    like = torch.empty(V, D, dtype=dtype)
    formed = like.new_zeros(V, D, dtype=gradients.pending_dtype(like, None))
    with BytesMoved(N) as count:
        gradients.scale_gradients([formed], torch.tensor(0.5), [like], [], "native", "test")
    assert count.moved == {"scale_rows_": formed.nbytes + like.nbytes}


def test_nothing_else_in_a_compiled_backward_touches_a_gradient():
    graphs = []

    def keep(graph, inputs):
        graphs.append(
            [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        )
        return make_boxed_func(graph)

    hidden, weight, labels = normal(N, D), normal(V, D), torch.randint(0, V, (N,))
    compiled = torch.compile(
        nitp_ops.linear_cross_entropy, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    compiled(hidden, weight, labels).backward()
    wanted = {"nitp_ops.scale_gradients.default", "<built-in function getitem>"}
    assert len(graphs) == 2 and set(graphs[1]) == wanted


@pytest.mark.parametrize("kernel", ["prepare_rows_", "finish_rows_"])
def test_what_stands_before_and_after_the_chunks_moves_its_sample_s_bytes(kernel):
    call = table.all_kernels()[kernel].sample(N, 7, torch.float32)
    with BytesMoved(1) as count:
        getattr(select.row_kernels("native"), kernel)(*call.arguments)
    # beside them the totals; of the stats the sum reads the losses alone
    beside = (
        call.arguments[5].nbytes if kernel == "prepare_rows_" else 8 + call.arguments[0][1].nbytes
    )
    assert count.total() == call.moved + beside


def nitp(rows=N):
    """What a call with gate_up moves beside its GEMMs, and they."""
    gemms = (
        (rows, D, 2 * M),
        (rows, M, D),
        (D, rows, M),
        (rows, D, M),
        (2 * M, rows, D),
        (rows, 2 * M, D),
    )
    rest = {
        "swiglu_rows": 3 * rows * M,
        "alignment_rows_": 3 * rows * D,
        "swiglu_rows_backward_": 5 * rows * M,
    }
    return gemm(*gemms), rest


@pytest.mark.parametrize("case", ["one", "apart", "valid", "sequences"])
def test_the_latent_loss_moves_its_gemms_its_activations_and_a_copy_only_where_it_must(case):
    hidden, target, down = normal(N + 1, D), torch.randn(N + 1, D), normal(D, M)
    given: dict[str, Any] = {"gate_up": normal(2 * M, D)}
    gemms, expected = nitp()
    if case == "apart":
        given = {"gate": normal(M, D), "up": normal(M, D)}
        expected["cat"] = 4 * M * D
    if case == "valid":
        given["valid"] = torch.ones(N + 1, dtype=torch.bool)
    if case == "sequences":  # the last row of the first one lies between rows that count
        shape = 2, (N + 2) // 2, D
        hidden, target = normal(*shape), torch.randn(shape)
        gemms, expected = nitp(N + 1)
    if case in ("valid", "sequences"):
        rows = N if case == "valid" else N + 1
        expected |= {"masked_fill": 2 * rows * D, "masked_fill_": 2 * rows * D}
    forward, backward = numbers(
        lambda: nitp_ops.implicit_token_loss(hidden, target, down=down, **given)
    )
    if case == "sequences":  # 65 rows: a library may be given more
        assert split(forward)[1].items() >= {"masked_fill": expected["masked_fill"]}.items()
    else:
        assert split(forward) == (gemms, expected)
    assert backward == {}


def test_the_objective_hands_its_matrices_over_as_they_are():
    objective, batch = build("nitp", model=INFO), make_batch()
    own = objective.terms["nitp"].gate_up
    with without_reading(), BytesMoved(own.numel()) as count:
        objective(batch.streams()).loss.backward()
    moved = {name for name, size in count.moved.items() if size}
    assert own.grad is not None and moved == {"mm", "swiglu_rows", "swiglu_rows_backward_"}
