"""Any set of objectives equals the sum of its terms: masks, documents, schedules, unequal weights,
a shared step."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nitp_ops.engine.registry import find
from nitp_ops.objectives import HeadTerm, Ramp, available, build, parse
from tests.support.objectives_cases import INFO, gradients, make_batch

# offsets that no other of the drawn terms predicts from the same hidden states with the same head
OPTIONS = {"mtp_parallel": "(offsets=[4, 5])", "mtp_shared": "(offsets=[2, 3], weights=[1, 0.5])"}
OPTIONS |= {"mtp_sequential": "(depth=2)", "top": "(window=3)", "nitp": "(target_layer=2)"}
HEAD_TERMS = [name for name in available() if issubclass(find(name), HeadTerm)]
OTHERS = [name for name in available() if name not in HEAD_TERMS]
WEIGHTS = st.sampled_from([0.3, 1.0, 0.0, Ramp(to=0.8, begin=2, warmup=6), Ramp(to=2.0, begin=5)])
HEADS = {"softcap": [None, 4.0], "logit_scale": [1.0, 0.7]}


def terms_of(names):
    """The terms under labels of their own."""
    return list(
        parse(" + ".join(f"x_{name}: {name}{OPTIONS.get(name, '')}" for name in names)).terms
    )


@st.composite
def sets(draw):
    """Terms of different objectives, each with a weight that may be zero or still rising."""
    heads = draw(st.lists(st.sampled_from(HEAD_TERMS), min_size=1, max_size=5, unique=True))
    names = draw(
        st.permutations(heads + draw(st.lists(st.sampled_from(OTHERS), max_size=2, unique=True)))
    )
    return [replace(term, weight=draw(WEIGHTS)) for term in terms_of(names)]


@settings(deadline=None, max_examples=60)
@given(
    terms=sets(),
    documents=st.lists(st.sampled_from([-1, 0, 1]), min_size=21, max_size=21),
    masked=st.lists(st.booleans(), min_size=21, max_size=21),
    step=st.integers(0, 9),
    head=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in HEADS.items()}),
)
@example(
    terms=terms_of(available()), documents=[0] * 21, masked=[True, True, False] * 7, step=0, head={}
)
def test_a_set_of_objectives_equals_the_sum_of_its_terms(terms, documents, masked, step, head):
    info, batch = replace(INFO, **head), make_batch()
    batch.documents = torch.tensor(documents).view(3, 7).sort(dim=1).values
    external = {term.label: batch.penalty() for term in terms}
    streams = batch.streams(target_mask=torch.tensor(masked).view(3, 7), external=external)
    combined, alone = build(terms, model=info), [build([term], model=info) for term in terms]
    out, outs = combined(streams, step=step), [own(streams, step=step) for own in alone]
    expected = torch.stack([own.loss for own in outs]).sum()
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-12)
    named = dict(combined.named_parameters())
    separate = {name: value for own in alone for name, value in own.named_parameters()}
    assert named.keys() == separate.keys() and all(
        torch.equal(named[name], separate[name]) for name in named
    )
    mine = gradients(out.loss, [*batch.leaves, *named.values()])
    theirs = gradients(expected, [*batch.leaves, *(separate[name] for name in named)])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    values = out.metrics.compute()
    for own in outs:
        for name, value in own.metrics.compute().items():
            if name != "loss":
                expected_value = torch.tensor(value, dtype=torch.float64)
                found = torch.tensor(values[name], dtype=torch.float64)
                torch.testing.assert_close(
                    found, expected_value, rtol=1e-9, atol=1e-12, equal_nan=True
                )
