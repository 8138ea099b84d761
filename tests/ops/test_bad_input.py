"""Bad input raises an error of one line: the argument, what it is, what is expected."""

from functools import partial
from typing import Any

import pytest
import torch

import nitp_ops
from nitp_ops import cross_entropy as ce
from nitp_ops import grouped_linear_cross_entropy as shared
from nitp_ops import implicit_token_loss as itl
from nitp_ops import linear_cross_entropy as lce

H, W, Y = torch.zeros(3, 4), torch.zeros(9, 4), torch.zeros(3, dtype=torch.int64)
G, U, D = torch.zeros(8, 4), torch.zeros(8, 4), torch.zeros(4, 8)
A_LIST: Any = [1.0]
A_WORD: Any = "x"
A_FLOAT: Any = 2.0
HL = torch.zeros(3, 4, requires_grad=True)
Y2 = torch.tensor([[0, -1], [0, 0], [0, 1]])
Y1W, Y2W = torch.ones(3, 1), torch.ones(3, 2)
LEARNED = torch.ones(3, requires_grad=True)
IN_PYTHON = partial(lce, HL, W, Y, hidden_grad_out=H.clone(), backend="reference")
INTEGER_LOGITS = partial(lce, H, W, Y, logits_dtype=torch.int64, backend="reference")
TWICE = partial(lce, H, W, Y2, target_weight=Y2W, class_weight=W[:, 0])
OVERLAPPING = partial(ce, H[:1].expand(3, 4), Y, inplace_gradient=True)
COLUMNS = partial(ce, torch.zeros(4, 3).t(), Y, inplace_gradient=True)
IN_PLACE_IN_PYTHON = partial(ce, H, Y, inplace_gradient=True, backend="reference")
WRONG = [
    (TypeError, "hidden is a list, expected a torch.Tensor", lambda: lce(A_LIST, W, Y)),
    (TypeError, "hidden is int32, expected", lambda: lce(H.int(), W, Y)),
    (TypeError, "labels is int32, expected int64", lambda: lce(H, W, Y.int())),
    (ValueError, r"labels has shape \(2,\), expected \(3,\)", lambda: lce(H, W, Y[:2])),
    (ValueError, r"hidden has shape \(3, 5\), expected \(3, "
                 r"4\)", lambda: lce(torch.zeros(3, 5), W, Y)),
    (ValueError, r"unembedding has shape \(9,\)", lambda: lce(H, W[:, 0], Y)),
    (IndexError, r"labels\[1\] is 9, expected a value "
                 r"in", lambda: lce(H, W, torch.tensor([0, 9, 1]))),
    (IndexError, r"labels\[0\] is -1,", lambda: lce(H, W, torch.tensor([-1, 2, 1]))),
    (ValueError, "reduction is 'avg', expected one of 'mean', 'sum', "
                 "'none'", lambda: lce(H, W, Y, reduction="avg")),
    (ValueError, "normalizer is only supported with "
                 "reduction", lambda: lce(H, W, Y, reduction="sum", normalizer=2)),
    (ValueError, "normalizer is 0, expected a number > 0", lambda: lce(H, W, Y, normalizer=0)),
    (ValueError, "label_smoothing is 1.5, expected", lambda: lce(H, W, Y, label_smoothing=1.5)),
    (TypeError, "z_loss is 'x', expected a number >= 0", lambda: lce(H, W, Y, z_loss=A_WORD)),
    (ValueError, "softcap is -1, expected a number > 0", lambda: lce(H, W, Y, softcap=-1)),
    (ValueError, "chunk_bytes is 0, expected an integer >= 1", lambda: lce(H, W, Y, chunk_bytes=0)),
    (ValueError, r"chunk_bytes is \d+, expected an integer >= 1 of 64 "
                 r"bits", lambda: lce(H, W, Y, chunk_bytes=2**70)),
    (ValueError, r"ignore_index is \d+, expected an integer of 64 "
                 r"bits", lambda: lce(H, W, Y, ignore_index=2**70)),
    (ValueError, "softcap is 1e-46, expected a number > 0 in the range "
                 "of", lambda: lce(H, W, Y, softcap=1e-46)),
    (ValueError, r"logit_scale is 1e\+39, expected a number > 0 "
                 r"in", lambda: lce(H, W, Y, logit_scale=1e39)),
    (ValueError, "normalizer is 10+, expected a number > 0", lambda: lce(H, W, Y, normalizer=10**400)),
    (TypeError, "hidden has the layout sparse_coo, expected "
                "strided", lambda: lce(H.detach().to_sparse(), W, Y)),
    (ValueError, "token_weight requires a gradient", lambda: lce(H, W, Y, token_weight=LEARNED)),
    (ValueError, r"token_weight has shape \(2,\), expected "
                 r"\(3,\)", lambda: lce(H, W, Y, token_weight=torch.ones(2))),
    (ValueError, "labels is on meta, expected cpu", lambda: lce(H, W, Y.to("meta"))),
    (ValueError, "backend is 'cuda', expected one of", lambda: lce(H, W, Y, backend="cuda")),
    (TypeError, "hidden is float64, expected float32", lambda: lce(H.double(), W, Y)),
    (ValueError, "label_smoothing is -0.1, expected a number >= 0", lambda: lce(H, W, Y, label_smoothing=-0.1)),
    (ValueError, "logit_scale is inf, expected a number > 0", lambda: lce(H, W, Y, logit_scale=float("inf"))),
    (ValueError, "logit_scale is nan, expected a number > 0", lambda: lce(H, W, Y, logit_scale=float("nan"))),
    (ValueError, r"target_weight is None, expected \(3, 2\) beside labels with 2", lambda: lce(H, W, Y2)),
    (ValueError, r"target_weight has shape \(3, 1\), expected \(3, "
                 r"2\)", lambda: lce(H, W, Y2, target_weight=Y1W)),
    (ValueError, r"labels has shape \(3,\), expected \(3, "
                 r"K\)", lambda: lce(H, W, Y, target_weight=Y1W)),
    (IndexError, r"labels\[2, 1\] is 9, expected a value "
                 r"in", lambda: lce(H, W, Y2 + 8, target_weight=Y2W)),
    (ValueError, r"class_weight has shape \(3,\), expected "
                 r"\(9,\)", lambda: lce(H, W, Y, class_weight=torch.ones(3))),
    (ValueError, "class_weight is not supported with target_weight", TWICE),
    (TypeError, "logits_dtype is 'x', expected 'auto' or a "
                "torch.dtype", lambda: lce(H, W, Y, logits_dtype="x")),
    (ValueError, "logits_dtype is torch.bfloat16, "
                 "expected", lambda: lce(H, W, Y, logits_dtype=torch.bfloat16)),
    (ValueError, "logits_dtype is torch.int64, expected", INTEGER_LOGITS),
    (ValueError, "max_rows is 2, expected at least 3", lambda: lce(H, W, Y, max_rows=2)),
    (TypeError, "max_rows is 2.0, expected an integer >= 0", lambda: lce(H, W, Y, max_rows=A_FLOAT)),
    (ValueError, "return_stats is 'all', expected "
                 "False,", lambda: lce(H, W, Y, return_stats="all")),
    (TypeError, "weight_grad_out is bfloat16, expected "
                "float32", lambda: lce(H, W, Y, weight_grad_out=W.bfloat16())),
    (ValueError, r"hidden_grad_out has shape \(9, 4\), expected \(3, "
                 r"4\)", lambda: lce(H, W, Y, hidden_grad_out=W)),
    (ValueError, "hidden_grad_out is given, but hidden requires "
                 "no", lambda: lce(H, W, Y, hidden_grad_out=H.clone())),
    (ValueError, "hidden_grad_out has "
                 "strides", lambda: lce(HL, W, Y, hidden_grad_out=torch.zeros(4, 3).t())),
    (ValueError, r"hidden_grad_out is not supported with backend=.reference.", IN_PYTHON),
    (ValueError, "terms is empty", lambda: shared([], W)),
    (ValueError, r"terms\[0\].labels has "
                 r"shape", lambda: shared([nitp_ops.CrossEntropyTerm(H, Y[:1])], W)),
    (ValueError, r"target has shape \(2, 4\), expected \(3, 4\)", lambda: itl(H, H[:2], G, U, D)),
    (ValueError, "up is None, expected gate and up together", lambda: itl(H, H, G, None, D)),
    (ValueError, "gate_up is given beside gate and up, expected one of "
                 "them", lambda: itl(H, H, G, U, D, gate_up=G)),
    (ValueError, r"down is None, expected \[D, m\] beside gate_up", lambda: itl(H, H, gate_up=G)),
    (ValueError, r"gate_up has shape \(7, 4\), expected \(2 m, "
                 r"4\)", lambda: itl(H, H, gate_up=G[:7], down=D)),
    (ValueError, r"gate_up has shape \(8, 3\), expected \(2 m, "
                 r"4\)", lambda: itl(H, H, gate_up=G[:, :3], down=D)),
    (ValueError, r"down has shape \(4, 8\), expected \(4, "
                 r"4\)", lambda: itl(H, H, gate_up=G, down=D)),
    (TypeError, "down is float64, expected float32", lambda: itl(H, H, gate_up=G, down=D.double())),
    (ValueError, "down is None, expected", lambda: itl(H, H, G, U)),
    (ValueError, r"down has shape \(4, 7\), expected \(4, 8\)", lambda: itl(H, H, G, U, D[:, :7])),
    (ValueError, "target has width 5, expected 4", lambda: itl(H, torch.zeros(3, 5))),
    (ValueError, "distance is 'l2', expected one of", lambda: itl(H, H, distance="l2")),
    (ValueError, "shift is -1, expected an integer >= 0", lambda: itl(H, H, shift=-1)),
    (ValueError, "max_rows is 1, expected at least 2, the valid "
                 "pairs", lambda: itl(H, H, max_rows=1)),
    (TypeError, "hidden_grad_out is float64, expected "
                "float32", lambda: itl(HL, H, hidden_grad_out=H.double())),
    (TypeError, "valid is float32, expected bool", lambda: itl(H, H, valid=torch.ones(3))),
    (ValueError, r"valid has shape "
                 r"\(2,\)", lambda: itl(H, H, valid=torch.ones(2, dtype=torch.bool))),
    (TypeError, "logits is a list, expected a torch.Tensor", lambda: ce(A_LIST, Y)),
    (TypeError, "logits is int32, expected", lambda: ce(H.int(), Y)),
    (ValueError, r"logits has shape \(\), expected \[\.\.\., V\] with V >= 1", lambda: ce(H[0, 0], Y)),
    (ValueError, r"logits has shape \(3, 0\), expected \[\.\.\., V\]", lambda: ce(H[:, :0], Y)),
    (TypeError, "^cross_entropy: labels is int32, expected int64", lambda: ce(H, Y.int())),
    (ValueError, r"labels has shape \(2,\), expected \(3,\) \(logits without its "
                 r"last", lambda: ce(H, Y[:2])),
    (IndexError, r"^cross_entropy: labels\[0\] is 4, expected a value in \[0, "
                 r"4\)", lambda: ce(H, Y + 4)),
    (ValueError, r"labels is on meta, expected cpu \(where logits is", lambda: ce(H, Y.to("meta"))),
    (ValueError, r"bias has shape \(9,\), expected \(4,\)", lambda: ce(H, Y, bias=W[:, 0])),
    (ValueError, r"class_weight has shape \(9,\), expected "
                 r"\(4,\)", lambda: ce(H, Y, class_weight=W[:, 0])),
    (ValueError, "^cross_entropy: normalizer is only "
                 "supported", lambda: ce(H, Y, reduction="sum", normalizer=2)),
    (ValueError, "^cross_entropy: return_stats is 'all'", lambda: ce(H, Y, return_stats="all")),
    (TypeError, "inplace_gradient is 'x', expected True or "
                "False", lambda: ce(H, Y, inplace_gradient=A_WORD)),
    (ValueError, r"logits has strides \(0, 1\), expected dense rows", OVERLAPPING),
    (ValueError, r"logits has strides \(1, 3\), expected dense rows", COLUMNS),
    (ValueError, r"inplace_gradient is not supported with backend=.reference.", IN_PLACE_IN_PYTHON),
    (ValueError, "eps is 0, expected a number > 0", lambda: nitp_ops.alignment(H, H, eps=0)),
    (ValueError, r"target has shape \(9, 4\), expected \(3, 4\)", lambda: nitp_ops.alignment(H, W)),
    (TypeError, "up is float64, expected float32", lambda: nitp_ops.swiglu(H, H.double())),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "message", "wrong"), WRONG, ids=[message for _, message, _ in WRONG]
)
def test_bad_input_is_answered_by_one_line_that_names_the_argument(kind, message, wrong):
    with pytest.raises(kind, match=message) as caught:
        wrong()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", [{"softcap": 1e-46}, {"logit_scale": 1e39}])
def test_float64_takes_numbers_that_float32_cannot_hold(option):
    torch.manual_seed(0)
    h, w = torch.randn(3, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    torch.testing.assert_close(
        lce(h, w, Y, **option), nitp_ops.reference.linear_cross_entropy(h, w, Y, **option)
    )


def test_a_z_loss_that_float32_rounds_to_zero_is_none():
    assert lce(H, W, Y, z_loss=1e-46) == lce(H, W, Y)
