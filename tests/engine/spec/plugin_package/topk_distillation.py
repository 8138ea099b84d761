"""Distillation from a teacher's most likely tokens, an objective for nitp_ops that lives in a
package of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nitp_ops.objectives import Context, HeadRows, HeadTerm, ModelInfo, Need, Streams


@dataclass(kw_only=True)
class TeacherStreams(Streams):
    """Streams that also bring a teacher's view of the token after each position.

    Args:
        teacher_tokens: int64 ``[B, T, K]``; ignore_index marks an absent one.
        teacher_probabilities: ``[B, T, K]``.
    """

    teacher_tokens: Tensor | None = None
    teacher_probabilities: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class TopKDistillation(HeadTerm):
    """``-sum_k q_k log softmax(W h_t)[v_k]`` over a teacher's K most likely tokens v_k for position
    t + 1.

    Against the model's unembedding: its rows join the pass of the other head terms. A row with a
    teacher token counts.

    Args:
        renormalize: q sums to one over the K tokens; else it is the teacher's probability.

    Example:
        >>> from nitp_ops.objectives import parse
        >>> parse("ntp + 0.5*topk_distillation").terms[1].renormalize
        True

    Source: knowledge distillation, arXiv 1503.02531.
    """

    renormalize: bool = True

    def requires(self, info: ModelInfo) -> frozenset[Need]:
        return frozenset(
            map(Need, ("last_hidden", "head", "teacher_tokens", "teacher_probabilities"))
        )

    def valid(self, streams: Streams) -> dict[str, Tensor]:
        return {"": self._present(streams).any(-1)}

    def rows(self, streams: Streams, context: Context) -> dict[str, HeadRows]:
        assert isinstance(streams, TeacherStreams) and streams.teacher_probabilities is not None
        assert (
            streams.last_hidden is not None
            and streams.head is not None
            and streams.teacher_tokens is not None
        )
        present = self._present(streams)
        q = torch.where(present, streams.teacher_probabilities.detach(), 0)
        if self.renormalize:
            q = q / q.sum(-1, keepdim=True).clamp(min=1e-6)
        labels = torch.where(present, streams.teacher_tokens, streams.ignore_index)
        return {"": HeadRows(streams.last_hidden, labels, streams.head, target_weight=q)}

    def _present(self, streams: Streams) -> Tensor:
        assert isinstance(streams, TeacherStreams) and streams.teacher_tokens is not None
        present = streams.teacher_tokens != streams.ignore_index
        return (
            present
            if streams.documents is None
            else present & (streams.documents >= 0).unsqueeze(-1)
        )
