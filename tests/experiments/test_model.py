"""The decoder of the pretraining example: causal, grouped, seeded, open at the streams that
objectives read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from experiments.train import model


def decoder(**changes):
    shapes: dict[str, Any] = {
        "vocab_size": 31,
        "dim": 24,
        "layers": 3,
        "heads": 3,
        "kv_heads": 3,
        "context": 16,
    } | changes
    return model.Decoder(model.ModelConfig(**shapes), seed=3).double()


def tokens(rows=2, time=12):
    return torch.randint(31, (rows, time), generator=torch.Generator().manual_seed(0))


def test_no_token_sees_a_later_one():
    net, ids = decoder(), tokens()
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 31
    before, after = net(ids).last_hidden, net(changed).last_hidden
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7], after[:, 7])


def test_the_streams_are_what_their_names_say():
    net, ids = decoder(), tokens()
    hidden = net(ids, keep=[0, 2, 3])
    assert sorted(hidden.hidden_states) == [0, 2, 3]
    assert torch.equal(hidden.hidden_states[0], net.embed(ids))
    rotation = net.cosine[:12], net.sine[:12]
    after_two = net.blocks[1](net.blocks[0](net.embed(ids), rotation), rotation)
    assert torch.equal(hidden.hidden_states[2], after_two)
    assert torch.equal(hidden.hidden_states[3], hidden.last_residual)
    assert torch.equal(net.norm(hidden.last_residual), hidden.last_hidden)


def test_only_the_states_asked_for_are_kept():
    assert decoder()(tokens()).hidden_states == {}


def test_grouped_queries_equal_full_attention_with_repeated_keys_and_values():
    grouped, full = decoder(heads=6, kv_heads=2, dim=24), decoder(heads=6, kv_heads=6, dim=24)
    state = grouped.state_dict()
    for name in list(state):
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = state[name].view(2, 4, 24).repeat_interleave(3, dim=0)
            state[name] = heads.reshape(24, 24)
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(tokens()).last_hidden, full(tokens()).last_hidden)


def test_rotation_makes_scores_depend_on_the_distance_only():
    cosine, sine = (table.double() for table in model.rotary_table(16, 8, 10_000.0))
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 1, 16, 8)
    scores = (model.rotate(q, cosine, sine) @ model.rotate(k, cosine, sine).mT)[0, 0]
    for distance in range(-15, 16):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-6)
    assert scores[0].std() > 1e-3


def test_one_seed_gives_one_set_of_weights_whatever_was_drawn_before():
    first = decoder().state_dict()
    torch.rand(17)
    for name, weight in decoder().state_dict().items():
        assert torch.equal(weight, first[name]), name


def test_tied_embeddings_are_one_parameter():
    net = decoder(tied=True)
    assert net.lm_head.weight is net.embed.weight
    assert (
        sum(p.numel() for p in net.parameters())
        == sum(p.numel() for p in decoder().parameters()) - 31 * 24
    )


def test_the_norm_is_the_formula():
    norm = model.RMSNorm(5, 1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_sampling_continues_past_the_context_and_leaves_the_global_random_state_alone():
    net = decoder()
    state = torch.get_rng_state()
    continuation = net.sample(torch.tensor([1, 2, 3]), 20, temperature=1.0, seed=0)
    assert continuation.shape == (20,) and int(continuation.max()) < 31
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cold_sample_is_the_most_likely_token():
    net, prompt = decoder(), torch.tensor([4, 5])
    likeliest = F.linear(net(prompt[None]).last_hidden[0, -1], net.lm_head.weight).argmax()
    assert net.sample(prompt, 1, temperature=1e-6, seed=0)[0] == likeliest


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dim": 25}, "dim is 25"),
        ({"kv_heads": 2}, "kv_heads is 2"),
        ({"layers": 0}, "layers is 0"),
    ],
)
def test_shapes_that_do_not_fit_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        decoder(**changes)
