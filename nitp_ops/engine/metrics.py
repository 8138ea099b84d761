"""What an objective measured, as numerators and denominators that can be added before they are
divided."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from nitp_ops.core.devices import for_sums

from .skill import constant_predictor
from .streams.collectives import all_reduce, is_distributed

_INTERNAL = ("weighted", "denominator", "loss", "count", "unit_target")


class Metrics:
    """Sums of one or more batches, float64, on the device; detached.

    ``a + b`` adds batches, `all_reduce` adds ranks, `compute` divides. For each part p of the
    objective:

    * ``loss/p``: ``weight * SUM / COUNT``, its contribution; ``loss``: the sum of all
      contributions;
    * ``p/loss``: ``SUM / COUNT``; ``p/count``; and what the term adds: accuracy for head terms;
    * ``p/constant_predictor_loss`` (``1 - |mean z^|``, the least loss of a constant) and ``p/skill``
      (``1 - loss / constant_predictor_loss``; NaN where that is < 1e-4), both under the cosine
      distance only; ``p/prediction_norm``, ``p/target_norm``: means over rows.

    COUNT is that of the batches added so far: one microbatch shows its own means, the sum over a
    window and its ranks the loss of the window. Over several steps `compute` gives means over rows,
    not means of step means.

    Args:
        sums: ``{part: {quantity: tensor}}`` with the quantities weighted, denominator, loss, count,
            perhaps unit_target (``[D]``), and any other sum, which is reported divided by count.

    Raises:
        ValueError: metrics of another objective are added.

    Example:
        >>> sums = {name: torch.tensor(value) for name, value in
        ...         {"weighted": 4.0, "denominator": 2.0, "loss": 8.0, "count": 2.0}.items()}
        >>> one = Metrics({"ntp": sums})
        >>> (one + one).compute()
        {'loss': 2.0, 'loss/ntp': 2.0, 'ntp/loss': 4.0, 'ntp/count': 4}
    """

    def __init__(self, sums: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._given = {
            part: {name: x.detach() if x.requires_grad else x for name, x in own.items()}
            for part, own in sums.items()
        }
        self._sums: dict[str, dict[str, Tensor]] | None = None

    @property
    def sums(self) -> dict[str, dict[str, Tensor]]:
        """``{part: {quantity: sum}}``, widened at the first read: most passes are never
        measured."""
        if self._sums is None:
            self._sums = {
                part: {name: for_sums(x) for name, x in own.items()}
                for part, own in self._given.items()
            }
        return self._sums

    def __add__(self, other: Metrics) -> Metrics:
        if not isinstance(other, Metrics):
            return NotImplemented
        if self._keys() != other._keys():
            raise ValueError(f"Metrics: other has {other._keys()}, expected {self._keys()}")
        sums = {}
        for part, mine in self.sums.items():
            theirs = other.sums[part]
            sums[part] = {name: mine[name] + theirs[name] for name in mine}
        return Metrics(sums)

    def contributing(self, where: Tensor) -> Metrics:
        """The same, but of parts that add nothing to the loss where a 0-d condition is False."""
        sums = {}
        for part, own in self.sums.items():
            weighted = torch.where(where, own["weighted"], 0)
            denominator = torch.where(where, own["denominator"], 0)
            sums[part] = own | {"weighted": weighted, "denominator": denominator}
        return Metrics(sums)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Metrics:
        """The sums over the ranks of ``group`` (None: all), in one collective. One process:
        unchanged."""
        if not is_distributed():
            return self
        flat = [x.reshape(-1) for own in self.sums.values() for x in own.values()]
        packed = all_reduce(torch.cat(flat), group, "metrics")
        reduced = iter(packed.split([x.numel() for x in flat]))
        sums = {}
        for part, own in self.sums.items():
            sums[part] = {name: next(reduced).view(x.shape) for name, x in own.items()}
        return Metrics(sums)

    def compute(self) -> dict[str, float]:
        """The quotients as Python numbers; waits for the device once."""
        values: dict[str, Tensor] = {}
        for part, own in self.sums.items():
            values[f"loss/{part}"] = own["weighted"] / own["denominator"].clamp(min=1)
        values = {"loss": torch.stack(list(values.values())).sum(), **values}
        for part, own in self.sums.items():
            rows = own["count"].clamp(min=1)
            mean = own["loss"] / rows
            values |= {f"{part}/loss": mean, f"{part}/count": own["count"]}
            values |= {
                f"{part}/{name}": x / rows for name, x in own.items() if name not in _INTERNAL
            }
            if "unit_target" in own:
                constant, skill = constant_predictor(own["unit_target"], own["count"], mean)
                values[f"{part}/constant_predictor_loss"] = constant
                values[f"{part}/skill"] = skill
        numbers = torch.stack(list(values.values())).tolist()
        return {
            name: int(number) if name.endswith("/count") else number
            for name, number in zip(values, numbers, strict=True)
        }

    def _keys(self) -> dict[str, list[str]]:
        return {part: sorted(own) for part, own in self.sums.items()}
