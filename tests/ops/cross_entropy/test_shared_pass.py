"""grouped_linear_cross_entropy: several terms, one matrix, one pass."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nitp_ops
from nitp_ops import reference
from nitp_ops.core import gemm
from tests.support.budget import close, outputs


def make(rows=12, width=6, vocabulary=31, dtype=torch.float64):
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, vocabulary, (rows,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_term_of_weight_zero_leaves_the_other_gradients_bit_identical(dtype):
    hidden, weight, labels = make(rows=130, width=48, vocabulary=700, dtype=dtype)
    other = torch.full((7, 48), float("nan"), dtype=dtype)
    main = nitp_ops.CrossEntropyTerm(hidden, labels, token_weight=torch.tensor(1 / 130))
    inactive = nitp_ops.CrossEntropyTerm(other, labels[:7], token_weight=torch.tensor(0.0))
    alone = outputs(
        lambda h, w: nitp_ops.grouped_linear_cross_entropy([main], w)[0], [hidden, weight]
    )
    beside = outputs(
        lambda h, w: nitp_ops.grouped_linear_cross_entropy([main, inactive], w)[0], [hidden, weight]
    )
    for a, b in zip(alone, beside, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_longer_term_of_weight_zero_does_not_move_the_chunks_of_the_others(dtype):
    hidden, weight, labels = make(rows=60, width=64, vocabulary=1000, dtype=dtype)
    main = nitp_ops.CrossEntropyTerm(hidden[:50], labels[:50], token_weight=torch.tensor(0.01))
    inactive = nitp_ops.CrossEntropyTerm(hidden, labels, token_weight=torch.tensor(0.0))
    size = 30 * 1000 * dtype.itemsize
    alone = outputs(
        lambda h, w: nitp_ops.grouped_linear_cross_entropy([main], w, chunk_bytes=size)[0],
        [hidden, weight],
    )
    beside = outputs(
        lambda h, w: nitp_ops.grouped_linear_cross_entropy([main, inactive], w, chunk_bytes=size)[
            0
        ],
        [hidden, weight],
    )
    for a, b in zip(alone, beside, strict=True):
        assert torch.equal(a, b)


def rows_of_gemms(monkeypatch, name):
    """Rows of every GEMM h W^T ("forward") or dlogits W ("grad_input") from here on."""
    seen, real = [], getattr(gemm.Weight, name)

    def spy(self, x, out):
        seen.append(len(x))
        return real(self, x, out)

    monkeypatch.setattr(gemm.Weight, name, spy)
    return seen


def term_of(rows, weight=1.0, grad=True):
    return nitp_ops.CrossEntropyTerm(
        torch.randn(rows, 6, requires_grad=grad),
        torch.randint(0, 31, (rows,)),
        token_weight=torch.tensor(weight),
    )


def test_a_chunk_holds_rows_of_several_terms_and_inactive_ones_stay_apart(monkeypatch):
    terms = [term_of(5), term_of(4, weight=0.0), term_of(7), term_of(10)]
    seen = rows_of_gemms(monkeypatch, "forward")
    weight = torch.randn(31, 6, requires_grad=True)
    nitp_ops.grouped_linear_cross_entropy(terms, weight, chunk_bytes=8 * 31 * 4)
    assert seen == [8, 8, 6, 4]
    size = 8 * 31 * 4
    plan = nitp_ops.explain(
        "linear_cross_entropy", rows=11, width=6, vocabulary=31, chunk_bytes=size, terms=2
    )
    seen.clear()
    nitp_ops.grouped_linear_cross_entropy([term_of(11), term_of(11)], weight, chunk_bytes=size)
    assert (plan.chunks, plan.chunk_rows) == (len(seen), seen[0]) == (3, 8)


def test_no_product_is_made_for_hidden_states_that_want_no_gradient(monkeypatch):
    terms = [term_of(16), term_of(40, grad=False), term_of(8)]
    seen = rows_of_gemms(monkeypatch, "grad_input")
    weight = torch.randn(31, 6, requires_grad=True)
    loss, _ = nitp_ops.grouped_linear_cross_entropy(terms, weight)
    assert seen == [24]
    assert len(torch.autograd.grad(loss, [weight, terms[0].hidden, terms[2].hidden])) == 3


@pytest.mark.skipif(
    not gemm.has_native_gemm("cpu", torch.bfloat16),
    reason="no bfloat16 GEMM writes float32 here",
)
def test_a_float32_buffer_takes_hidden_gradients_of_a_shared_chunk_without_a_rounding():
    hidden = [torch.randn(8, 64).bfloat16().requires_grad_() for _ in range(2)]
    buffers, labels = [torch.zeros(8, 64) for _ in range(2)], torch.randint(0, 33, (8,))
    weight = torch.randn(33, 64).bfloat16()
    terms = [
        nitp_ops.CrossEntropyTerm(h, labels, token_weight=torch.tensor(0.1), hidden_grad_out=buffer)
        for h, buffer in zip(hidden, buffers, strict=True)
    ]
    nitp_ops.grouped_linear_cross_entropy(terms, weight)[0].backward()
    for h, buffer in zip(hidden, buffers, strict=True):
        apart = torch.zeros(8, 64)
        term = nitp_ops.CrossEntropyTerm(
            h, labels, token_weight=torch.tensor(0.1), hidden_grad_out=apart
        )
        nitp_ops.grouped_linear_cross_entropy([term], weight)[0].backward()
        assert torch.equal(buffer, apart) and not torch.equal(buffer, buffer.bfloat16().float())


@given(st.integers(1, 4), st.integers(0, 2**20))
def test_the_shared_pass_equals_the_sum_of_its_jobs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(19, 5, generator=generator, dtype=torch.float64).requires_grad_()
    terms = []
    for place in range(count):
        hidden = torch.randn(
            2, 3 + place, 5, generator=generator, dtype=torch.float64
        ).requires_grad_()
        labels = torch.randint(0, 19, (2, 3 + place), generator=generator)
        labels[0, 0] = -100
        terms.append(
            nitp_ops.CrossEntropyTerm(
                hidden,
                labels,
                token_weight=torch.rand((), generator=generator).double(),
                label_smoothing=0.1 * place,
                z_loss=0.01,
            )
        )
    inputs = [weight, *(term.hidden for term in terms)]
    together = outputs(
        lambda w, *_: nitp_ops.grouped_linear_cross_entropy(terms, w, chunk_bytes=19 * 8 * 2)[0],
        inputs,
    )
    apart = outputs(lambda w, *_: reference.grouped_linear_cross_entropy(terms, w), inputs)
    for a, b in zip(together, apart, strict=True):
        close(a, b)
