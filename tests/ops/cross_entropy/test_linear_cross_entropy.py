"""linear_cross_entropy: every law of the token-side op."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import nitp_ops
from nitp_ops import reference
from tests.support.budget import close, near, outputs, widened

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
ROW = 8  # bytes of a float64


@st.composite
def problems(draw):
    dtype = draw(DTYPES)
    rows, width = draw(st.integers(0, 17)), draw(st.integers(1, 24))
    vocabulary = draw(st.sampled_from([1, 2, 7, 64, 333, 2049, 4500]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    spread = draw(st.sampled_from([0.3, 3.0]))
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = (
        spread
        * torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
        / width**0.5
    )
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    ignored = torch.rand(rows, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    options = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "z_loss": draw(st.sampled_from([0.0, 1e-2])),
        "softcap": draw(st.sampled_from([None, 3.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.4])),
    }
    inputs = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
    if draw(st.booleans()):
        inputs.append(
            torch.randn(vocabulary, generator=generator, dtype=torch.float64)
            .to(dtype)
            .requires_grad_()
        )
    work = torch.float64 if dtype == torch.float64 else torch.float32
    labels = labels.masked_fill(ignored, -100)
    if draw(st.booleans()):
        options["token_weight"] = torch.rand(rows, generator=generator, dtype=torch.float64).to(
            work
        )
    targets = draw(st.sampled_from(["one", "class weights", "several"]))
    if targets == "class weights":
        options["class_weight"] = torch.rand(
            vocabulary, generator=generator, dtype=torch.float64
        ).to(work)
    elif targets == "several":
        several = draw(st.integers(0, 4))
        labels = torch.randint(-2, vocabulary, (rows, several), generator=generator).masked_fill(
            ignored[:, None], -100
        )
        options["target_weight"] = torch.rand(
            rows, several, generator=generator, dtype=torch.float64
        ).to(work)
    upstream = (
        torch.rand(rows, generator=generator, dtype=work)
        if options["reduction"] == "none"
        else 0.37
    )
    chunk = draw(st.sampled_from([1, vocabulary * ROW * 3, None]))
    return inputs, labels, options, upstream, chunk


def call(function, labels, options):
    def of_tensors(hidden, weight, bias=None):
        return function(hidden, weight, labels, bias=bias, **options)

    return of_tensors


@given(problems())
def test_it_equals_the_reference(problem):
    inputs, labels, options, upstream, chunk = problem
    ours = outputs(
        call(nitp_ops.linear_cross_entropy, labels, {**options, "chunk_bytes": chunk}),
        inputs,
        upstream,
    )
    exact = outputs(
        call(reference.linear_cross_entropy, labels, options), widened(inputs), upstream
    )
    near(ours, exact, ["loss", "d hidden", "d unembedding", "d bias"])
    assert [x.dtype for x in ours[1:]] == [x.dtype for x in inputs]


def test_the_reference_is_pytorchs_cross_entropy():
    hidden, weight = torch.randn(9, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    labels = torch.randint(0, 11, (9,))
    labels[3] = -100
    for smoothing in (0.0, 0.2):
        for reduction in ("mean", "sum", "none"):
            expected = F.cross_entropy(
                hidden @ weight.T, labels, reduction=reduction, label_smoothing=smoothing
            )
            options = {"reduction": reduction, "label_smoothing": smoothing}
            close(reference.linear_cross_entropy(hidden, weight, labels, **options), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_holds_in_float64(reduction):
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 6, -100, 3, 3])

    def loss(hidden, weight, bias):
        options = {
            "label_smoothing": 0.1,
            "z_loss": 0.02,
            "softcap": 2.0,
            "logit_scale": 0.7,
            "chunk_bytes": 120,
        }
        return nitp_ops.linear_cross_entropy(
            hidden, weight, labels, bias=bias, reduction=reduction, **options
        )

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def make(rows=12, width=6, vocabulary=31, dtype=torch.float64):
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, vocabulary, (rows,))


def test_any_leading_shape_and_any_strides_give_the_same_numbers():
    hidden, weight, labels = make(24)
    expected = outputs(lambda h, w: nitp_ops.linear_cross_entropy(h, w, labels), [hidden, weight])
    shaped = outputs(
        lambda h, w: nitp_ops.linear_cross_entropy(h.view(2, 3, 4, 6), w, labels.view(2, 3, 4)),
        [hidden, weight],
    )
    crossed = hidden.detach().view(4, 6, 6).transpose(0, 1)  # leading axes that no view can flatten
    crossed = crossed.clone(memory_format=torch.preserve_format).requires_grad_()
    assert not crossed.is_contiguous()
    order = torch.arange(24).view(4, 6).T.reshape(-1)
    strided = outputs(
        lambda h, w: nitp_ops.linear_cross_entropy(
            h, w, labels[order].view(6, 4), chunk_bytes=31 * 8 * 5
        ),
        [crossed, weight],
    )
    column_major = hidden.detach().t().contiguous().t().requires_grad_()
    transposed = outputs(
        lambda h, w: nitp_ops.linear_cross_entropy(h, w, labels), [column_major, weight]
    )
    for other in (shaped, transposed):
        for a, b in zip(other, expected, strict=True):
            close(a, b.view(a.shape))
    close(strided[0], expected[0])
    close(strided[1].transpose(0, 1).reshape(24, 6), expected[1])
    close(strided[2], expected[2])


def test_chunking_row_order_and_batch_splits_change_nothing():
    hidden, weight, labels = make(40)
    labels[5] = -100
    whole = outputs(
        lambda h, w: nitp_ops.linear_cross_entropy(h, w, labels, reduction="sum"), [hidden, weight]
    )
    for rows in (1, 3, 7, 39):
        size = rows * 31 * 8
        chunked = outputs(
            lambda h, w, size=size: nitp_ops.linear_cross_entropy(
                h, w, labels, reduction="sum", chunk_bytes=size
            ),
            [hidden, weight],
        )
        for a, b in zip(chunked, whole, strict=True):
            close(a, b)
    shuffle = torch.randperm(40)
    shuffled = outputs(
        lambda h, w: nitp_ops.linear_cross_entropy(h[shuffle], w, labels[shuffle], reduction="sum"),
        [hidden, weight],
    )
    halves = outputs(
        lambda h, w: sum(
            nitp_ops.linear_cross_entropy(h[part], w, labels[part], reduction="sum")
            for part in (slice(0, 13), slice(13, 40))
        ),
        [hidden, weight],
    )
    for other in (shuffled, halves):
        for a, b in zip(other, whole, strict=True):
            close(a, b)


def test_a_normalizer_makes_microbatches_equal_the_whole_batch():
    hidden, weight, labels = make(20)
    labels[:7] = -100
    count = (labels != -100).sum()
    whole = outputs(lambda h, w: nitp_ops.linear_cross_entropy(h, w, labels), [hidden, weight])
    parts = outputs(
        lambda h, w: sum(
            nitp_ops.linear_cross_entropy(h[p], w, labels[p], normalizer=count)
            for p in (slice(0, 9), slice(9, 20))
        ),
        [hidden, weight],
    )
    for a, b in zip(parts, whole, strict=True):
        close(a, b)


def test_retained_graphs_and_any_upstream_gradient_agree():
    hidden, weight, labels = make()
    for reduction in ("mean", "none"):
        loss = nitp_ops.linear_cross_entropy(hidden, weight, labels, reduction=reduction).sum()
        first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        second = torch.autograd.grad(loss * 3, (hidden, weight), retain_graph=True)
        third = torch.autograd.grad(loss, (hidden, weight))
        for a, b, c in zip(first, second, third, strict=True):
            close(b, 3 * a)
            assert torch.equal(a, c)


def test_a_gradient_that_was_handed_out_is_never_written_to_again():
    hidden, weight, labels = make()
    loss = nitp_ops.linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    assert weight.grad is not None
    weight.grad.zero_()
    again = torch.autograd.grad(loss, weight)[0]
    assert again.abs().sum() > 0


def test_only_wanted_gradients_are_computed(monkeypatch):
    from nitp_ops.ops.cross_entropy import chunked

    hidden, weight, labels = make()
    made = []
    original = chunked.WeightGradient

    class Counted(original):
        def __init__(self, *args):
            made.append(1)
            super().__init__(*args)

    monkeypatch.setattr(chunked, "WeightGradient", Counted)
    nitp_ops.linear_cross_entropy(hidden, weight.detach(), labels).backward()
    assert not made
    nitp_ops.linear_cross_entropy(hidden, weight, labels).backward()
    assert made
