"""An error names what the user called, whichever op found it."""

from __future__ import annotations

import pytest
import torch

import nitp_ops
from nitp_ops import CrossEntropyTerm
from nitp_ops.objectives import build
from tests.support.objectives_cases import INFO, make_batch

LABELS = torch.tensor([1, 2, 0])


def op_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)


@pytest.mark.parametrize("op", ["linear_cross_entropy", "grouped_linear_cross_entropy"])
def test_refusals_of_the_backward_pass_name_the_op_that_was_called(op: str):
    hidden, weight = op_inputs()
    if op == "linear_cross_entropy":
        loss = nitp_ops.linear_cross_entropy(hidden, weight, LABELS)
    else:
        loss, _ = nitp_ops.grouped_linear_cross_entropy([CrossEntropyTerm(hidden, LABELS)], weight)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match=rf"^{op}: double backward is not supported"):
        torch.autograd.grad(gradient.sum(), weight)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"labels": LABELS + 3},
            IndexError,
            r"terms\[0\]\.labels\[1\] is 5, expected a value in "
            r"\[0, 5\)",
        ),
        ({"z_loss": -1}, ValueError, r"terms\[0\]\.z_loss is -1, expected a number >= 0"),
        ({"max_rows": 1}, ValueError, r"terms\[0\]\.max_rows is 1, expected at least 3"),
    ],
)
def test_checks_of_a_shared_pass_name_it_and_the_job(given, error, message):
    hidden, weight = op_inputs()
    with pytest.raises(error, match=rf"^grouped_linear_cross_entropy: {message}"):
        nitp_ops.grouped_linear_cross_entropy(
            [CrossEntropyTerm(hidden, **{"labels": LABELS} | given)], weight
        )
    with pytest.raises(
        ValueError,
        match=r"^grouped_linear_cross_entropy: logits_dtype is "
        r"torch.float64, expected",
    ):
        nitp_ops.grouped_linear_cross_entropy(
            [CrossEntropyTerm(hidden, LABELS)], weight, logits_dtype=torch.float64
        )


def test_an_objective_names_the_term_whose_rows_an_op_refuses():
    batch = make_batch()
    narrow = batch.hidden.detach().float()
    with pytest.raises(TypeError, match=r"^objective: main\.hidden is float32, expected float64"):
        build("main: ntp", model=INFO)(batch.streams(last_hidden=narrow))
    with pytest.raises(TypeError, match=r"^late: gate_up is float64, expected float32"):
        build("late: nitp", model=INFO)(
            batch.streams(last_hidden=narrow, hidden_states={1: narrow})
        )


def test_errors_that_are_no_op_s_stay_as_they_are():
    batch = make_batch()
    with pytest.raises(ValueError, match=r"^nextlat: token_ids is missing"):
        build("nextlat", model=INFO)(batch.streams(token_ids=None, labels=batch.ids))
