"""The CUDA kernel of the cross-entropy, compiled by g++ and run thread by thread, equals the CPU's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nitp_ops.kernels import select
from tests.kernels.cuda_source.build_for_cpu import H200_SHARED, choose, placed, simt, untouched
from tests.support.budget import near

pytestmark = pytest.mark.gpu_source

if select.load_error is not None:
    pytest.skip(
        f"no compiled kernels to compare with: {select.load_error}", allow_module_level=True
    )

NAN = float("nan")
NARROW = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*NARROW, torch.float64]
COLUMNS = [1, 7, 31, 33, 255, 1000, 1537]


@pytest.fixture(scope="module", autouse=True)
def kernels():
    return simt()


def working(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def cross_entropy(
    logits,
    labels,
    *,
    kernels,
    target_weight=None,
    bias=None,
    class_weight=None,
    row_scale=None,
    ignore_index=-100,
    negative_is_absent=False,
    smoothing=0.0,
    z_loss=0.0,
    softcap=0.0,
    scale=1.0,
    entropy=False,
    gradient=True,
    partials=False,
):
    """[gradient, stats, target logits, predictions], with partials=True also softmax_partials,
    in the dtype of the kernel."""
    work, count = working(logits.dtype), len(logits)
    stats = torch.full((3 if entropy else 2, count), NAN, dtype=work)
    target_logit = torch.full(labels.shape, 7.0, dtype=work)
    prediction = torch.full((count,), -7)
    softmax_partials = torch.full((4, count), NAN, dtype=work)
    listed = [
        None if x is None else x.to(work) for x in (target_weight, bias, class_weight, row_scale)
    ]
    kernels.cross_entropy_rows_(
        logits,
        labels,
        *listed,
        stats,
        target_logit,
        prediction,
        ignore_index,
        negative_is_absent,
        smoothing,
        z_loss,
        softcap,
        scale,
        gradient,
        softmax_partials if partials else None,
    )
    return [logits, stats, target_logit, prediction, *([softmax_partials] if partials else [])]


def ours_and_exact(logits, labels, **options):
    """Of the CUDA kernel in the dtype of `logits`, and of the CPU kernel in float64."""
    exact = cross_entropy(logits.double().clone(), labels, kernels=torch.ops.nitp_ops, **options)
    return cross_entropy(logits, labels, kernels=torch.ops.nitp_simt, **options), exact


def same(ours, exact):
    """Equal up to rounding, NaN where the other is NaN; the predictions are the same columns."""
    assert torch.equal(ours[3], exact[3])
    names = ("gradient", "stats", "target_logit", "softmax_partials")
    for name, a, b in zip(names, ours[:3] + ours[4:], exact[:3] + exact[4:], strict=False):
        assert torch.equal(a.isnan(), b.isnan()), name
        near([a.nan_to_num(0, 0, 0)], [b.nan_to_num(0, 0, 0)], [name])


@st.composite
def case(draw, sizes=COLUMNS):
    """A job for the kernel with any options: everything a caller can choose."""
    columns, dtype = draw(st.sampled_from(sizes)), draw(st.sampled_from(DTYPES))
    count, targets = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 3, 40]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    logits = 3 * torch.randn(count, columns).to(dtype)
    labels = torch.randint(0, columns, (count, targets))
    labels[torch.rand(count, targets) < 0.2] = -100
    options = {
        "target_weight": draw(st.sampled_from([None, torch.rand(count, targets)])),
        "bias": draw(st.sampled_from([None, torch.randn(columns)])),
        "class_weight": draw(st.sampled_from([None, torch.rand(columns)])),
        "row_scale": draw(st.sampled_from([None, torch.tensor([0.7, 0.0, -2.0])[:count]])),
        "smoothing": draw(st.sampled_from([0.0, 0.1])),
        "z_loss": draw(st.sampled_from([0.0, 0.01])),
        "softcap": draw(st.sampled_from([0.0, 4.0])),
        "scale": draw(st.sampled_from([1.0, 0.6])),
        "entropy": draw(st.booleans()),
        "negative_is_absent": draw(st.booleans()),
        "gradient": draw(st.sampled_from([True, True, False])),
        "partials": draw(st.booleans()),
    }
    place = draw(st.integers(0, 9)), columns + draw(st.sampled_from([0, 1, 8]))
    return logits, labels, options, place


@given(case(), st.sampled_from([0, 24 * 1024, H200_SHARED]))
def test_every_option_dtype_stride_and_address(case, shared_bytes):
    logits, labels, options, place = case
    choose("forward", shared_bytes)
    rows_ = placed(logits, *place)
    ours, exact = ours_and_exact(rows_, labels, **options)
    same(ours, exact)
    assert untouched(rows_)
    choose("shuffled", shared_bytes)
    again = cross_entropy(placed(logits, *place), labels, kernels=torch.ops.nitp_simt, **options)
    for a, b in zip(ours, again, strict=True):  # bit for bit, in whatever order the threads run
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared_bytes", [0, 20 * 1024, H200_SHARED])
def test_a_long_row_is_the_same_from_registers_shared_memory_or_read_again(dtype, shared_bytes):
    choose("backward", shared_bytes)
    logits, labels = torch.randn(2, 17011).to(dtype), torch.tensor([[5], [17010]])
    same(*ours_and_exact(placed(logits, 3, 17020), labels, smoothing=0.1))
    same(*ours_and_exact(placed(logits, 3, 17020), labels, softcap=2.0, entropy=True))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("options", [{}, {"entropy": True, "bias": torch.zeros(1000)}])
def test_a_nan_or_an_infinity_spoils_its_own_row_only(dtype, options):
    choose()
    logits = torch.randn(5, 1000).to(dtype)
    logits[0, 500], logits[1, 3], logits[2, 999], logits[3] = (
        NAN,
        float("inf"),
        -float("inf"),
        -float("inf"),
    )
    same(*ours_and_exact(logits, torch.tensor([[7]] * 5), **options))


def test_a_nan_under_a_weight_of_zero_or_in_an_ignored_row_stays_out():
    choose()
    logits = torch.full((2, 300), NAN)
    gradient, stats, _, _ = cross_entropy(
        logits,
        torch.tensor([[4], [-100]]),
        kernels=torch.ops.nitp_simt,
        row_scale=torch.tensor([0.0, 1.0]),
    )
    assert not gradient.any() and stats[0, 1] == 0 and stats[1, 1].isnan()


@pytest.mark.parametrize("label", [-1, 33, 2**40, -(2**62)])
@pytest.mark.parametrize("targets", [1, 2])
def test_a_label_outside_the_vocabulary_poisons_its_row_and_reads_nothing(label, targets):
    choose()
    labels = torch.tensor([[3] * targets, [3] * (targets - 1) + [label], [-100] * targets])
    ours, exact = ours_and_exact(torch.randn(3, 33), labels, smoothing=0.1)
    assert ours[0][1].isnan().all() and ours[1][0, 1].isnan() and ours[2][1, -1].isnan()
    same(ours, exact)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "options", [{}, {"class_weight": torch.rand(2000, generator=torch.Generator().manual_seed(1))}]
)
def test_a_common_offset_of_ten_thousand_costs_no_digit(smoothing, options):
    choose()
    logits = (torch.randn(4, 2000) * 2).mul(2**10).round() / 2**10  # exact beside 1e4 in float32
    labels = torch.randint(0, 2000, (4, 1))
    _, near_zero = ours_and_exact(logits.clone(), labels, smoothing=smoothing, **options)
    ours, _ = ours_and_exact(logits + 10000, labels, smoothing=smoothing, **options)
    assert (ours[1][0] - near_zero[1][0]).abs().max() < 4e-6
    near([ours[0]], [near_zero[0]])


def test_the_prediction_is_the_first_of_equal_maxima():
    choose("shuffled")
    logits = torch.zeros(4, 5000).to(torch.bfloat16)
    for row, first in enumerate((0, 9, 1027, 4999)):
        logits[row, first:] = torch.where(torch.arange(first, 5000) % 7 == first % 7, 1.0, 0.5).to(
            logits.dtype
        )
    *_, prediction = cross_entropy(
        placed(logits, 5, 5003), torch.zeros(4, 1).long(), kernels=torch.ops.nitp_simt
    )
    assert prediction.tolist() == [0, 9, 1027, 4999]


def test_no_rows_and_no_targets():
    choose()
    same(*ours_and_exact(torch.randn(0, 9), torch.zeros(0, 1).long()))
    same(*ours_and_exact(torch.randn(2, 9), torch.zeros(2, 0).long()))


def test_arguments_are_checked_at_the_door():
    with pytest.raises(RuntimeError, match="labels must hold 2 dense CPU values"):
        cross_entropy(torch.randn(2, 9), torch.zeros(2, 1).int(), kernels=torch.ops.nitp_simt)
    with pytest.raises(
        RuntimeError, match="logits must be a CPU tensor of 2 rows with 9 dense columns"
    ):
        cross_entropy(torch.randn(9, 2).t(), torch.zeros(2, 1).long(), kernels=torch.ops.nitp_simt)


def test_a_row_that_a_kernel_cannot_take_is_an_error_in_python():
    logits = torch.empty(1, 2**31 - 1, dtype=torch.bfloat16)  # never touched: no memory
    with pytest.raises(
        RuntimeError,
        match=r"^nitp_ops row kernel: logits has more than 2\^31 - 2 "
        r"columns$",
    ):
        cross_entropy(logits, torch.zeros(1, 1).long(), kernels=torch.ops.nitp_simt)
