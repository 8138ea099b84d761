"""On a GPU the host must not wait for a value: the passes that read none give the numbers of those
that do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nitp_ops
import tests.ops.cross_entropy.test_linear_cross_entropy as token
import tests.ops.implicit_token.test_implicit_token_loss as latent
from nitp_ops import CrossEntropyTerm, reference
from tests.core.without_reading import NoReading, without_reading
from tests.support.budget import near, outputs, widened

NAN = float("nan")
#: No bound, one that is too large for nothing, and one that just holds.
BOUNDS = st.sampled_from([None, "rows", "exactly"])


def bound(kind, count, total):
    return {None: None, "rows": total + 3, "exactly": count}[kind]


def labelled_rows(labels, options):
    present = labels != -100
    return int(
        (present & (labels >= 0)).any(-1).sum() if "target_weight" in options else present.sum()
    )


@given(token.problems(), BOUNDS)
def test_linear_cross_entropy_equals_the_reference(problem, kind):
    inputs, labels, options, upstream, chunk = problem
    most = bound(kind, labelled_rows(labels, options), len(labels))
    ours = token.call(
        nitp_ops.linear_cross_entropy, labels, {**options, "chunk_bytes": chunk, "max_rows": most}
    )
    with without_reading():
        ours = outputs(ours, inputs, upstream)
    exact = outputs(
        token.call(reference.linear_cross_entropy, labels, options), widened(inputs), upstream
    )
    near(ours, exact, ["loss", "d hidden", "d weight", "d bias"])


@given(latent.problems(), BOUNDS)
def test_implicit_token_loss_equals_the_reference(problem, kind):
    inputs, options, upstream, chunk = problem
    pairs = reference.pairs(inputs[0], options["valid"], options["shift"])
    most = bound(kind, int(pairs.sum()), pairs.numel())
    ours = latent.call(
        nitp_ops.implicit_token_loss, {**options, "chunk_bytes": chunk, "max_rows": most}
    )
    with without_reading():
        ours = outputs(ours, inputs, upstream)
    latent.near_the_reference(ours, inputs, options, upstream)


def head(rows=9, width=5, vocabulary=33, dtype=torch.float64):
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocabulary, (rows,))
    labels[::3] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("most", [None, 6, 7])
def test_statistics_of_every_row_are_those_of_the_cpu(reduction, most):
    hidden, weight, labels = head()
    options = {
        "reduction": reduction,
        "return_stats": "entropy",
        "max_rows": most,
        "chunk_bytes": 700,
    }
    with without_reading():
        loss, stats = nitp_ops.linear_cross_entropy(hidden, weight, labels, **options)
    expected, of_cpu = nitp_ops.linear_cross_entropy(hidden, weight, labels, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(stats, of_cpu, equal_nan=True)
    h, z, *projector = latent.make()
    valid = torch.rand(2, 6) < 0.6
    options = {
        "valid": valid,
        "return_stats": True,
        "reduction": reduction,
        "max_rows": most and 10,
    }
    with without_reading():
        loss, stats = nitp_ops.implicit_token_loss(h, z, *projector, **options)
    expected, of_cpu = nitp_ops.implicit_token_loss(h, z, *projector, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(stats, of_cpu)


def everything(with_bounds: bool):
    """Forward and backward of every op, with an upstream that is not one and a second backward
    pass."""
    hidden, weight, labels = head()
    most = 6 if with_bounds else None
    bias, weights = (
        torch.randn(33, dtype=torch.float64, requires_grad=True),
        torch.rand(9, dtype=torch.float64),
    )
    h, z, *projector = latent.make()
    pairs = {"valid": torch.rand(2, 6) < 0.6, "max_rows": 10 if with_bounds else None}
    with NoReading():
        for reduction in ("mean", "none"):
            options = {
                "reduction": reduction,
                "max_rows": most,
                "return_stats": True,
                "chunk_bytes": 600,
            }
            options |= {"bias": bias, "token_weight": weights, "label_smoothing": 0.1}
            loss, _ = nitp_ops.linear_cross_entropy(hidden, weight, labels, **options)
            (loss * 0.3).sum().backward(retain_graph=True)
            loss.sum().backward()
            loss, _ = nitp_ops.implicit_token_loss(
                h, z, *projector, reduction=reduction, return_stats=True, chunk_bytes=900, **pairs
            )
            (loss * 0.3).sum().backward(retain_graph=True)
            loss.sum().backward()
        jobs = [
            CrossEntropyTerm(hidden, labels, token_weight=0.5 * weights, max_rows=most),
            CrossEntropyTerm(hidden, labels, token_weight=torch.zeros(()).double()),
        ]
        nitp_ops.grouped_linear_cross_entropy(jobs, weight)[0].backward()
        nitp_ops.alignment(h, h.detach() + 1).sum().backward()
        nitp_ops.swiglu(h, h).sum().backward()


@pytest.mark.parametrize("with_bounds", [False, True])
def test_no_value_is_read(with_bounds):
    with without_reading():
        everything(with_bounds)


def test_the_check_itself_sees_a_pass_that_reads():
    with pytest.raises(AssertionError, match="reads a value"):
        everything(False)


@pytest.mark.parametrize("most", [0, 3, 5])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_more_rows_than_the_bound_give_nan_not_a_wrong_number(most, reduction):
    hidden, weight, labels = head()
    h, z, *projector = latent.make()
    with without_reading():
        loss = nitp_ops.linear_cross_entropy(
            hidden, weight, labels, max_rows=most, reduction=reduction
        )
        assert loss.isnan()[labels != -100].all() if reduction == "none" else loss.isnan()
        loss = nitp_ops.implicit_token_loss(h, z, *projector, max_rows=most, reduction=reduction)
        assert loss.isnan()[:, :-1].all() if reduction == "none" else loss.isnan()


def test_an_ignored_nan_reaches_nothing():
    hidden, weight, labels = head()
    with torch.no_grad():
        hidden[0] = NAN  # its label is -100
    h, z, *projector = latent.make()
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0, 2], valid[1, 3] = False, False
    with torch.no_grad():
        h[0, 2], z[1, 4] = NAN, NAN
    with without_reading():
        for reduction in ("mean", "none"):
            ours = outputs(
                token.call(nitp_ops.linear_cross_entropy, labels, {"reduction": reduction}),
                (hidden, weight),
            )
            assert all(x.isfinite().all() for x in ours)
            options = {"valid": valid, "reduction": reduction}
            ours = outputs(latent.call(nitp_ops.implicit_token_loss, options), (h, z, *projector))
            assert all(x.isfinite().all() for x in ours)


def test_a_nan_under_a_weight_of_zero_reaches_no_gradient():
    hidden, weight, labels = head()
    h, z, *projector = latent.make()
    with torch.no_grad():
        hidden[1], h[0, 2] = NAN, NAN
    token_weight = torch.ones(9, dtype=torch.float64)
    token_weight[1] = 0
    with without_reading():
        ours = outputs(
            token.call(nitp_ops.linear_cross_entropy, labels, {"token_weight": token_weight}),
            (hidden, weight),
        )
        assert all(x.isfinite().all() for x in ours)
        options = {"normalizer": torch.tensor(float("inf")).double()}  # a term of weight zero
        ours = outputs(latent.call(nitp_ops.implicit_token_loss, options), (h, z, *projector))
        assert all((x == 0).all() for x in ours)


@pytest.mark.parametrize("options", [{}, {"chunk_bytes": 400}], ids=["one chunk", "several"])
def test_a_weight_of_zero_leaves_the_other_jobs_bit_identical(options):
    hidden, weight, labels = head(dtype=torch.bfloat16)
    inactive = CrossEntropyTerm(
        torch.randn(31, 5).bfloat16(), torch.randint(0, 33, (31,)), token_weight=torch.tensor(0.0)
    )

    def loss(*others):
        def of_tensors(hidden, weight):
            jobs = [CrossEntropyTerm(hidden, labels, token_weight=torch.tensor(0.2)), *others]
            return nitp_ops.grouped_linear_cross_entropy(jobs, weight, **options)[0]

        return of_tensors

    with without_reading():
        both, alone = outputs(loss(inactive), (hidden, weight)), outputs(loss(), (hidden, weight))
    for a, b in zip(both[:2], alone[:2], strict=True):
        assert torch.equal(a, b)


def test_float16_gradients_do_not_underflow_under_a_large_count(monkeypatch):
    """As on a GPU, where float16 GEMMs write float16: 1 / count enters after them."""
    hidden, weight, labels = head(64, 32, 50)
    inputs = [hidden.detach().half().requires_grad_(), weight.detach().half().requires_grad_()]
    h, z, *projector = (
        x.detach().half().requires_grad_(x.requires_grad) for x in latent.make(length=32, width=16)
    )
    for module in ("core.gemm", "ops.implicit_token.autograd"):
        monkeypatch.setattr(f"nitp_ops.{module}.gemm_dtype", lambda *_: torch.float16)
    options = {"normalizer": 2.0**22}  # a gradient of a logit is 1e-9 then: float16 ends at 6e-8
    token_loss, latent_loss = (
        f(getattr(nitp_ops, name), *rest)
        for f, name, rest in (
            (token.call, "linear_cross_entropy", (labels, options)),
            (latent.call, "implicit_token_loss", (options,)),
        )
    )
    upstream = 2.0**20  # of a GradScaler
    with without_reading():
        ours = (
            outputs(token_loss, inputs, upstream),
            outputs(latent_loss, (h, z, *projector), upstream),
        )
    exact = token.call(reference.linear_cross_entropy, labels, options)
    for a, b in zip(ours[0], outputs(exact, widened(inputs), upstream), strict=True):
        assert (a.double() - b).norm() <= 2e-3 * b.norm()
    exact = latent.call(reference.implicit_token_loss, options)
    for a, b in zip(ours[1], outputs(exact, widened((h, z, *projector)), upstream), strict=True):
        assert (a.double() - b).norm() <= 4e-3 * b.norm()
