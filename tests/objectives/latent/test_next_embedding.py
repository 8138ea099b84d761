"""Next-embedding prediction is NITP with two other defaults."""

from __future__ import annotations

import torch.nn.functional as F

from nitp_ops.objectives import build, parse
from tests.support.objectives_cases import INFO, assert_same, make_batch


def test_it_compares_each_hidden_state_with_the_next_embedding():
    batch = make_batch()
    target = batch.states[0].detach()[:, 1:]
    expected = (1 - F.cosine_similarity(batch.hidden[:, :-1], target, dim=-1, eps=1e-12)).mean()
    assert_same(build("next_embedding", model=INFO)(batch.streams()).loss, expected, batch.leaves)


def test_it_is_nitp_without_a_projector_on_layer_zero():
    preset, explicit = (
        parse("next_embedding").to_dict(),
        parse("nitp(target_layer=0, projector=none)").to_dict(),
    )
    assert preset["next_embedding"] == explicit["nitp"]


def test_the_other_options_of_nitp_are_its_own():
    batch = make_batch()
    options = "(shift=2, distance=mse, target_layer=3)"
    mine = build(f"next_embedding{options}", model=INFO)(batch.streams()).loss
    theirs = build(f"nitp{options[:-1]}, projector=none)", model=INFO)(batch.streams()).loss
    assert_same(mine, theirs, batch.leaves)
