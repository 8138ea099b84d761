"""The names of the package: all resolve, and none costs the import of the package its time."""

from __future__ import annotations

import subprocess
import sys

import pytest

import nitp_ops

FIRST_USE_IS_TRACED = """
import sys
import torch
import nitp_ops
assert "nitp_ops.ops.cross_entropy.autograd" not in sys.modules, "the import of the package defined the custom ops"

@torch.compile(fullgraph=True, backend="eager")
def loss(hidden, unembedding, labels):
    return nitp_ops.linear_cross_entropy(hidden, unembedding, labels)

tensors = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6)
print(torch.equal(loss(*tensors), nitp_ops.linear_cross_entropy(*tensors)))
"""


@pytest.mark.parametrize("name", sorted({*nitp_ops.__all__, "attach", "attaching", "objectives"}))
def test_a_public_name_resolves_and_is_listed(name):
    value = getattr(nitp_ops, name)
    assert getattr(nitp_ops, name) is value
    assert name in dir(nitp_ops)


def test_a_name_that_is_none_is_an_attribute_error():
    with pytest.raises(
        AttributeError, match="module 'nitp_ops' has no attribute 'linear_cross_entrpy'"
    ):
        _ = nitp_ops.linear_cross_entrpy  # type: ignore[attr-defined]


def test_the_first_use_may_be_in_a_compiled_function(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", FIRST_USE_IS_TRACED], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.stdout == "True\n", run.stderr[-2000:]
