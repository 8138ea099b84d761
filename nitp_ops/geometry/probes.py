"""What a frozen hidden state says about a later token: a linear and a nearest-neighbour probe."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from .probe_rows import Probe, split_rows

__all__ = ["Probe", "knn_probe", "linear_probe"]


@torch.no_grad()
def linear_probe(
    hidden: Tensor,
    token_ids: Tensor,
    offset: int = 1,
    *,
    document_ids: Tensor | None = None,
    target_mask: Tensor | None = None,
    held_out: float | Tensor = 0.25,
    seed: int = 0,
    ridge: float = 1e-3,
) -> Probe:
    """Accuracy of ``argmax_v (A f_t + b)_v`` against x_{t+j}, with A, b the ridge regression of
    one-hot tokens on f_t.

    ``A, b = argmin 1/n sum_t |A f_t + b - onehot(x_{t+j})|^2 + ridge |A|^2`` over the rows of the
    training sequences, ``f_t = (h_t - mean) / scale``, ``scale^2`` the mean of the features'
    variances: one number, so that rotating the features changes nothing. The closed form, by one
    Cholesky factorisation in float64: exact and reproducible. Memory beyond the inputs: d^2 + d C
    numbers for C distinct tokens, and one block of 32 MiB.

    Row t counts when token t + j lies in the same sequence and document and target_mask lets it be
    a target. Whole sequences are held out: rows of one sequence share their context.

    Args:
        hidden: ``[..., T, d]``, floating point; the leading axes are sequences, at least two.
        token_ids: ``[..., T]``, int64.
        offset: j >= 0; 0 is the token that h_t has read.
        document_ids: ``[..., T]`` integers, negative = padding; without them a sequence is one
            document.
        target_mask: ``[..., T]`` bool: token t may be a target.
        held_out: the share of the sequences that is held out, drawn with `seed`, or ``[...]`` bool
            that names them (to keep the sequences of one document on one side).
        seed: of the draw, with a generator of its own.
        ridge: > 0, in units of the features' mean variance.

    Returns:
        A `Probe`: accuracy, the majority-class baseline beside it, numbers of rows, definition.

    Raises:
        TypeError, ValueError: another dtype, shape or range; fewer than two sequences; a NaN or
            infinity in a row that counts.

    Example:
        >>> import torch
        >>> ids = torch.randint(5, (40, 12), generator=torch.Generator().manual_seed(0))
        >>> ahead = ids.roll(-2, dims=1)  # h_t holds x_{t+2}
        >>> hidden = torch.nn.functional.one_hot(ahead, 5).float()
        >>> linear_probe(hidden, ids, offset=2).accuracy
        1.0
        >>> linear_probe(hidden, ids, offset=1).accuracy < 0.5
        True

    Source: Alain and Bengio, arXiv 1610.01644 (linear probes); least squares on one-hot targets:
        Hastie, Tibshirani and
    Friedman, "The Elements of Statistical Learning", section 4.2.
    """
    op = "linear_probe"
    ridge = checks.number(op, "ridge", ridge, least=0.0, open_end=True)
    split = split_rows(op, hidden, token_ids, offset, document_ids, target_mask, held_out, seed)
    definition = (
        f"held-out accuracy for x[t+{offset}] of ridge regression to one-hot tokens (ridge "
        f"{ridge:g}; features centred, divided by one scale)"
    )
    if split.empty:
        return split.measured(0, offset, definition)
    n, d = len(split.train), split.mean.shape[0]
    sums = split.mean.new_zeros(split.classes.shape[0], d)
    for features, tokens in split.train.blocks(d, torch.float64):
        sums.index_add_(0, tokens, features - split.mean)
    covariance = split.scatter / (n * split.scale.square())
    covariance.diagonal().add_(ridge)
    weight = torch.cholesky_solve(sums.T / (n * split.scale), torch.linalg.cholesky(covariance))
    correct = 0
    for features, tokens in split.held_out.blocks(max(d, split.classes.shape[0]), torch.float64):
        scores = torch.addmm(split.frequency, (features - split.mean) / split.scale, weight)
        correct += int((split.classes[scores.argmax(dim=-1)] == tokens).sum())
    return split.measured(correct, offset, definition)


@torch.no_grad()
def knn_probe(
    hidden: Tensor,
    token_ids: Tensor,
    offset: int = 1,
    *,
    k: int = 16,
    document_ids: Tensor | None = None,
    target_mask: Tensor | None = None,
    held_out: float | Tensor = 0.25,
    seed: int = 0,
) -> Probe:
    """Accuracy of the vote of the k nearest training rows, ``mode {x_{s+j} : s in kNN(h_t)}``,
    against x_{t+j}.

    Distance: Euclidean, in float32, after the features are centred and divided by one scale (see
        `linear_probe`; it
    moves no neighbour, it keeps float32 exact). Where two tokens get as many votes, the one with
    the nearest row wins. Where there are fewer than k training rows, all of them vote. The cost is
    one GEMM, train x held-out rows x d; memory beyond the inputs: a float32 copy of the training
    rows and one block of 16 MiB.

    Args:
        hidden: ``[..., T, d]``, floating point; the leading axes are sequences, at least two.
        token_ids: ``[..., T]``, int64.
        offset: j >= 0; 0 is the token that h_t has read.
        k: neighbours that vote, at least 1.
        document_ids: ``[..., T]`` integers, negative = padding; without them a sequence is one
            document.
        target_mask: ``[..., T]`` bool: token t may be a target.
        held_out: the share of the sequences that is held out, drawn with `seed`, or ``[...]`` bool
            that names them.
        seed: of the draw, with a generator of its own.

    Returns:
        A `Probe`: accuracy, the majority-class baseline beside it, numbers of rows, definition.

    Raises:
        TypeError, ValueError: another dtype, shape or range; fewer than two sequences; a NaN or
            infinity in a row that counts.

    Example:
        >>> import torch
        >>> ids = torch.randint(5, (40, 12), generator=torch.Generator().manual_seed(0))
        >>> ahead = ids.roll(-2, dims=1)  # h_t holds x_{t+2}
        >>> hidden = torch.nn.functional.one_hot(ahead, 5).float()
        >>> knn_probe(hidden, ids, offset=2).accuracy
        1.0

    Source: Cover and Hart, "Nearest neighbor pattern classification" (1967); on hidden states of
        language models:
    Khandelwal et al., arXiv 1911.00172.
    """
    op = "knn_probe"
    k = checks.integer(op, "k", k, least=1)
    split = split_rows(op, hidden, token_ids, offset, document_ids, target_mask, held_out, seed)
    definition = (
        f"held-out accuracy for x[t+{offset}] of the vote of the {k} nearest training rows "
        "(Euclidean)"
    )
    if split.empty:
        return split.measured(0, offset, definition)

    def standardised(features: Tensor) -> Tensor:
        return ((features - split.mean) / split.scale).float()

    d = split.mean.shape[0]
    keys = torch.cat(
        [standardised(features) for features, _ in split.train.blocks(d, torch.float64)]
    )
    squares = keys.square().sum(dim=-1)
    correct = 0
    for features, tokens in split.held_out.blocks(len(keys), torch.float64):
        # |f - key|^2 without |f|^2, which orders no neighbour
        distances = torch.addmm(squares, standardised(features), keys.T, alpha=-2)
        near = split.train.tokens[distances.topk(min(k, len(keys)), largest=False).indices]
        votes = (near.unsqueeze(-1) == near.unsqueeze(-2)).sum(dim=-1)
        # argmax takes the first maximum, and neighbours are sorted: the nearest of the tied tokens
        chosen = near.gather(-1, votes.argmax(dim=-1, keepdim=True)).squeeze(-1)
        correct += int((split.classes[chosen] == tokens).sum())
    return split.measured(correct, offset, definition)
