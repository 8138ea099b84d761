"""cross_entropy: the loss of logits that exist already, by the row kernel of
`linear_cross_entropy`.

The public function. `term.py` checks, `autograd.py` is autograd.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .... import reference
from ....core import checks
from ....core.chunking import Rows
from ....kernels import select
from .. import term_reference
from ..autograd import as_tensor
from ..stats import stats_of
from ..term import (
    CrossEntropyTerm,
    checked_normalizer,
    checked_targets,
    checked_transform,
    labels_inside,
    tensors_of,
)
from .autograd import logits_pass

_OP = "cross_entropy"


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    target_weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    normalizer: float | Tensor | None = None,
    inplace_gradient: bool = False,
    return_stats: bool | str = False,
    backend: str | None = None,
) -> Any:
    """Cross-entropy of logits that exist already; `linear_cross_entropy` never makes them whole and
    takes less memory.

    ``z = cap * tanh(scale * (logits + b) / cap)``; the loss of a row and every option that is not
    named below mean what they mean in `linear_cross_entropy`.

    No copy of the logits is made in float32. The backward pass makes one gradient of the logits'
    shape and dtype, or, with inplace_gradient, none: it overwrites the logits.

    Args:
        logits: ``[..., V]`` float64, float32, bfloat16 or float16, any strides.
        labels: ``[...]`` int64 in ``[0, V)``, or `ignore_index`; with target_weight ``[..., K]``.
        inplace_gradient: the backward pass writes the gradient where the logits are, so that these
            hold it afterwards. Who reads the logits after that reads the gradient; autograd refuses
            a second backward pass, and any other that needs the logits ("modified by an inplace
            operation"). Rows must be dense and must not overlap. Under torch.compile and
            create_graph=True the gradient has memory of its own.

    Returns:
        The loss in float32 (float64 for float64), 0-d or ``[...]``; with return_stats ``(loss,
        stats)``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        IndexError: a label outside ``[0, V)`` that is not `ignore_index`.
        BackendError: the requested backend does not serve this device.
        NotImplementedError: double backward, forward mode, torch.func transforms.

    Example:
        >>> import torch, nitp_ops
        >>> labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
        >>> round(nitp_ops.cross_entropy(torch.zeros(2, 3, 16), labels).item(), 4)  # ln 16
        2.7726

    Source: as of `linear_cross_entropy`.
    """
    checks.is_plain(_OP, "logits", logits)
    checks.is_float(_OP, "logits", logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(
            f"{_OP}: logits has shape {tuple(logits.shape)}, expected [..., V] with V >= 1"
        )
    columns, work = logits.shape[-1], reference.working(logits)
    cap, scale = checked_transform(
        _OP, "logits", logits, columns, bias, ignore_index, softcap, logit_scale
    )
    normalizer = checked_normalizer(_OP, reduction, normalizer, return_stats, work)
    term = CrossEntropyTerm(
        logits,
        labels,
        token_weight=token_weight,
        target_weight=target_weight,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    term = checked_targets(_OP, term, "logits", columns)
    chosen = select.select_backend(_OP, logits.device, backend)
    _check_in_place(inplace_gradient, logits, chosen)
    if chosen == "reference":
        if checks.plain(labels):
            labels_inside(_OP, term, ignore_index, columns)
        transform = {
            "bias": bias,
            "ignore_index": ignore_index,
            "softcap": softcap,
            "logit_scale": scale,
        }
        return term_reference.loss_of_rows(
            term, None, reduction, normalizer, return_stats, **transform
        )
    checks.plain_autograd(_OP, bias, *tensors_of(term))
    given = (
        logits, bias, labels, token_weight, target_weight, class_weight, term.label_smoothing,
        term.z_loss, ignore_index, cap, scale, chosen, reduction, as_tensor(normalizer, logits),
        return_stats == "entropy", inplace_gradient,
    )  # fmt: skip
    loss, values = logits_pass(*given)
    return (loss, stats_of(values, [term])[0]) if return_stats else loss


def _check_in_place(inplace_gradient: object, logits: Tensor, backend: str) -> None:
    if not isinstance(inplace_gradient, bool):
        raise TypeError(f"{_OP}: inplace_gradient is {inplace_gradient!r}, expected True or False")
    if not inplace_gradient:
        return
    if backend == "reference":
        raise ValueError(
            f"{_OP}: inplace_gradient is not supported with backend='reference' (it leaves "
            "gradients to autograd)"
        )
    held = Rows(logits)
    row, column = held.tensor.stride() if held.flat else (0, 0)
    if logits.numel() == 0 or (
        (held.width == 1 or column == 1) and (held.count == 1 or row >= held.width)
    ):
        return
    raise ValueError(
        f"{_OP}: logits has strides {logits.stride()}, expected dense rows that do not overlap "
        "with inplace_gradient (as those of logits.contiguous())"
    )
