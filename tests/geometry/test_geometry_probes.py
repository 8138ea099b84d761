"""The probes of `nitp_ops.geometry`: what they decode, what they must not see, what changes
nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nitp_ops import geometry
from nitp_ops.geometry import Probe, knn_probe, linear_probe

PROBES = {"linear": linear_probe, "knn": knn_probe}
every_probe = pytest.mark.parametrize("probe", PROBES.values(), ids=list(PROBES))
CLASSES, WIDTH = 6, 8


def tokens(sequences: int = 40, length: int = 16, seed: int = 0) -> torch.Tensor:
    return (
        torch.randint(CLASSES, (sequences, length), generator=torch.Generator().manual_seed(seed))
        * 7
    )


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def code(ids: torch.Tensor, offset: int, spread: float = 0.02, seed: int = 2) -> torch.Tensor:
    """h_t holds a random vector for x_{t+offset}, a little noise, and nothing else; past the end it
    is NaN."""
    book = noise(int(ids.max()) + 1, WIDTH, seed=seed)
    ahead = torch.full((*ids.shape, WIDTH), math.nan)
    ahead[:, : ids.shape[1] - offset] = book[ids[:, offset:]]
    return ahead + spread * noise(*ahead.shape, seed=seed + 1)


@every_probe
@settings(deadline=None, max_examples=15)
@given(offset=st.integers(0, 8), seed=st.integers(0, 2**16))
def test_a_code_of_the_token_j_ahead_is_read_without_error_and_no_row_past_the_end_counts(
    probe, offset, seed
):
    ids = tokens(seed=seed)
    result = probe(code(ids, offset, seed=seed), ids, offset)
    assert result.accuracy == 1.0
    assert (result.offset, result.train_rows, result.held_out_rows) == (
        offset,
        30 * (16 - offset),
        10 * (16 - offset),
    )


@every_probe
def test_a_code_of_another_offset_says_no_more_than_the_most_frequent_token(probe):
    ids = tokens(300, 20)
    result = probe(code(ids, 2)[:, :18], ids[:, :18], 1)
    error = math.sqrt(result.baseline * (1 - result.baseline) / result.held_out_rows)
    assert (
        abs(result.accuracy - 1 / CLASSES) < 4 * error
        and abs(result.baseline - 1 / CLASSES) < 4 * error
    )


def test_noise_leaves_the_linear_probe_at_the_baseline():
    ids = torch.where(noise(200, 20, seed=3) > -0.5, 7, tokens(200, 20))
    result = linear_probe(noise(200, 20, WIDTH), ids)
    error = math.sqrt(result.baseline * (1 - result.baseline) / result.held_out_rows)
    assert result.baseline > 0.6 and abs(result.accuracy - result.baseline) < error


def test_the_nearest_neighbour_of_a_training_point_is_the_point_itself():
    ids, hidden = tokens(20), noise(20, 16, WIDTH)
    twice = torch.arange(40) >= 20
    result = knn_probe(hidden.repeat(2, 1, 1), ids.repeat(2, 1), k=1, held_out=twice)
    assert result.accuracy == 1.0
    assert knn_probe(hidden.repeat(2, 1, 1), ids.repeat(2, 1), k=7, held_out=twice).accuracy < 0.6


def test_the_baseline_is_the_share_of_the_most_frequent_training_token():
    ids = torch.tensor([[0, 5, 5, 5], [0, 5, 5, 3], [0, 3, 3, 5], [0, 3, 3, 3]])
    held_out = torch.tensor([False, False, True, True])
    for probe in PROBES.values():
        assert probe(noise(4, 4, 3), ids, held_out=held_out).baseline == pytest.approx(1 / 6)


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 0.5, 1.0, 2.0])
def test_the_linear_probe_is_the_ridge_regression_of_one_hot_tokens(ridge):
    ids = torch.where(noise(40, 16, seed=3) > 0, 7, tokens())
    hidden = code(ids, 1, spread=1.0)
    held_out = torch.arange(40) >= 25
    x, y = hidden[:25, :-1].reshape(-1, WIDTH).double(), ids[:25, 1:].reshape(-1)
    mean, n = x.mean(0), len(x)
    scale = (x - mean).square().mean().sqrt()
    # The ridge as extra rows of an ordinary least-squares problem.
    left = torch.cat(
        [(x - mean) / scale, (ridge * n) ** 0.5 * torch.eye(WIDTH, dtype=torch.float64)]
    )
    onehot = torch.nn.functional.one_hot(y, 36).double()
    right = torch.cat([onehot - onehot.mean(0), torch.zeros(WIDTH, 36, dtype=torch.float64)])
    weight = torch.linalg.lstsq(left, right).solution
    test = (hidden[25:, :-1].reshape(-1, WIDTH).double() - mean) / scale
    named = (test @ weight + onehot.mean(0)).argmax(-1)
    expected = (named == ids[25:, 1:].reshape(-1)).double().mean()
    assert 0.5 < expected < 0.95
    assert linear_probe(hidden, ids, held_out=held_out, ridge=ridge).accuracy == pytest.approx(
        float(expected), abs=1e-12
    )


@settings(deadline=None, max_examples=10)
@given(k=st.integers(1, 12), seed=st.integers(0, 2**16))
def test_the_neighbours_vote_and_of_tied_tokens_the_nearest_wins(k, seed):
    ids, hidden = tokens(8, 6, seed), noise(8, 6, 3, seed=seed)
    held_out = torch.arange(8) >= 6
    keys, votes = hidden[:6, :-1].reshape(-1, 3), ids[:6, 1:].reshape(-1)
    right = 0
    for query, target in zip(hidden[6:, :-1].reshape(-1, 3), ids[6:, 1:].reshape(-1), strict=True):
        near = votes[(keys - query).square().sum(-1).argsort()[:k]].tolist()
        right += max(near, key=lambda token: (near.count(token), -near.index(token))) == target
    assert knn_probe(hidden, ids, k=k, held_out=held_out).accuracy == right / 10


def test_all_training_rows_vote_where_there_are_fewer_than_k():
    ids, hidden = tokens(4, 3), noise(4, 3, 2)
    assert knn_probe(hidden, ids, k=1000).accuracy == knn_probe(hidden, ids, k=6).accuracy


@every_probe
def test_rotation_scale_offset_and_leading_axes_change_nothing(probe):
    ids, hidden = tokens(), code(tokens(), 1, spread=1.0).double()
    before = probe(hidden, ids)
    assert before.accuracy > before.baseline + 0.1
    rotation = torch.linalg.qr(noise(WIDTH, WIDTH).double()).Q
    for changed in (hidden @ rotation, hidden * 1e4, hidden * 1e-4, hidden + 50.0):
        assert abs(probe(changed, ids).accuracy - before.accuracy) <= 1 / before.held_out_rows
    named = torch.zeros(40, dtype=torch.bool).index_fill_(0, torch.tensor([3, 8, 30]), True)
    nested = probe(hidden.view(5, 8, 16, WIDTH), ids.view(5, 8, 16), held_out=named.view(5, 8))
    assert nested == probe(hidden, ids, held_out=named)


@every_probe
def test_small_blocks_and_strided_states_change_nothing(probe, monkeypatch):
    ids, hidden = tokens(), code(tokens(), 1, spread=1.0).repeat_interleave(2, dim=-1)
    whole = probe(hidden[..., ::2].contiguous(), ids)
    monkeypatch.setattr("nitp_ops.geometry.probe_rows._BLOCK_ELEMENTS", 100)
    assert probe(hidden[..., ::2], ids) == whole


@every_probe
def test_targets_of_another_document_padding_and_masked_targets_count_nowhere(probe):
    ids = tokens(80, 16)
    documents = torch.zeros(80, 16, dtype=torch.int64)
    documents[:, 5:], documents[:, 10:] = 1, -1
    mask = torch.ones(80, 16, dtype=torch.bool)
    mask[:, 3] = False
    counts = torch.zeros(80, 16, dtype=torch.bool)
    counts[:, [0, 2, 5, 6, 7]] = True  # t + 2 in the same document, not token 3, not padding
    hidden = code(ids, 2).masked_fill(~counts[..., None], math.nan)
    result = probe(hidden, ids, 2, document_ids=documents, target_mask=mask)
    assert (result.accuracy, result.train_rows, result.held_out_rows) == (1.0, 60 * 5, 20 * 5)


@every_probe
def test_whole_sequences_are_held_out_and_their_tokens_reach_no_fit(probe):
    ids = tokens()
    hidden, held_out = code(ids, 1), torch.arange(40) % 4 == 0
    swapped = ids.masked_scatter(held_out[:, None].expand_as(ids), (ids[held_out] + 7) % 42)
    before, after = probe(hidden, ids, held_out=held_out), probe(hidden, swapped, held_out=held_out)
    assert (before.accuracy, before.held_out_rows, before.train_rows) == (1.0, 150, 450)
    assert after.accuracy == 0.0


@every_probe
def test_the_split_comes_from_its_seed_alone(probe):
    ids, hidden = tokens(), code(tokens(), 1, spread=1.0)
    state = torch.get_rng_state()
    first = probe(hidden, ids, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    assert probe(hidden, ids, seed=5) == first
    assert len({probe(hidden, ids, seed=seed).accuracy for seed in range(6)}) > 1
    assert probe(hidden, ids, held_out=0.9).train_rows == 4 * 15
    assert probe(hidden[:2], ids[:2], held_out=0.01).held_out_rows == 15


@every_probe
def test_a_token_that_training_never_saw_is_never_named(probe):
    ids = tokens()
    hidden, held_out = code(ids, 1), torch.arange(40) >= 30
    ids[30:] += 1000
    assert probe(hidden, ids, held_out=held_out).accuracy == 0.0


@every_probe
@pytest.mark.parametrize(
    "hidden", [torch.ones(6, 9, 3), torch.zeros(6, 9, 3)], ids=["equal", "zero"]
)
def test_equal_states_say_what_the_most_frequent_token_says(probe, hidden):
    ids = torch.where(tokens(6, 9) > 7, 7, 0)
    result = probe(hidden, ids)
    assert result.accuracy == result.baseline > 0.5


@every_probe
def test_no_row_on_one_side_is_not_a_number(probe):
    ids, hidden = tokens(), noise(40, 16, WIDTH)
    for offset, held_out in (
        (16, 0.5),
        (1, torch.zeros(40, dtype=torch.bool)),
        (1, torch.ones(40, dtype=torch.bool)),
    ):
        result = probe(hidden, ids, offset, held_out=held_out)
        assert math.isnan(result.accuracy) and math.isnan(result.baseline)
        assert 0 in (result.train_rows, result.held_out_rows)


@every_probe
def test_bfloat16_states_that_need_a_gradient_are_read_and_left_alone(probe):
    ids = tokens()
    hidden = code(ids, 0).bfloat16().requires_grad_()
    result = probe(hidden, ids, 0)
    assert result.accuracy == 1.0 and hidden.grad is None
    assert isinstance(result, Probe) and "x[t+0]" in result.definition


H, IDS = torch.zeros(4, 6, 3), torch.zeros(4, 6, dtype=torch.int64)
WRONG = [
    (TypeError, "hidden is a list, expected a torch.Tensor", [[1.0], IDS], {}),
    (TypeError, "hidden is int64, expected a floating point dtype", [H.long(), IDS], {}),
    (ValueError, r"hidden has shape \(6, 3\), expected \(\.\.\., T, d\) with "
                 r"two", [H[0], IDS[0]], {}),
    (ValueError, r"hidden has shape \(1, 6, 3\), expected", [H[:1], IDS[:1]], {}),
    (ValueError, r"token_ids has shape \(3, 6\), expected \(4, 6\)", [H, IDS[:3]], {}),
    (TypeError, "token_ids is int32, expected int64", [H, IDS.int()], {}),
    (ValueError, "offset is -1, expected an integer >= 0", [H, IDS, -1], {}),
    (ValueError, r"document_ids has shape \(4, 5\)", [H, IDS], {"document_ids": IDS[:, 1:]}),
    (TypeError, "target_mask is int64, expected bool", [H, IDS], {"target_mask": IDS}),
    (ValueError, "token_ids is on meta, expected cpu", [H, IDS.to("meta")], {}),
    (ValueError, "held_out is 1.0, expected a number inside", [H, IDS], {"held_out": 1.0}),
    (ValueError, "held_out is 0, expected a number > 0", [H, IDS], {"held_out": 0}),
    (ValueError, r"held_out has shape \(6,\), expected \(4,\) \(one a "
                 r"sequence\)", [H, IDS], {"held_out": IDS[0] > 0}),
    (ValueError, "hidden has NaN or infinity in 20 of 20 rows that count", [H / 0, IDS], {}),
]  # fmt: skip


@every_probe
@pytest.mark.parametrize(
    ("kind", "message", "arguments", "options"), WRONG, ids=[row[1] for row in WRONG]
)
def test_bad_input_is_answered_by_one_line_that_names_the_argument(
    probe, kind, message, arguments, options
):
    with pytest.raises(kind, match=f"{probe.__name__}: {message}") as caught:
        probe(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_each_probe_names_its_own_option():
    with pytest.raises(ValueError, match="linear_probe: ridge is 0, expected a number > 0"):
        geometry.linear_probe(H, IDS, ridge=0)
    with pytest.raises(ValueError, match="knn_probe: k is 0, expected an integer >= 1"):
        geometry.knn_probe(H, IDS, k=0)
