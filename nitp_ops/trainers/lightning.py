"""Lightning: a callback that gives a LightningModule its training objective.

    callback = ObjectiveCallback("ntp + 0.8*nitp(target_layer=0.2)")
    trainer = L.Trainer(callbacks=[callback], accumulate_grad_batches=4)

A module that wraps a Hugging Face model needs nothing else: ``self.model(**batch).loss``, which its
``training_step`` returns, is the objective. A module that builds its own streams holds an objective
and returns its `objective_loss`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from nitp_ops.attaching.optimizers import check_optimizers

from .requirements import STREAMS, check_streams, check_version

check_version("lightning", "2.4", "3.0")

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from torch import Tensor  # noqa: E402

from nitp_ops.attaching.api import attach  # noqa: E402
from nitp_ops.attaching.handle import Handle  # noqa: E402
from nitp_ops.engine.parsing import SpecLike  # noqa: E402
from nitp_ops.engine.streams.streams import LabelLayout  # noqa: E402
from nitp_ops.objectives import CompositeObjective, Counts, Metrics, Output, Streams  # noqa: E402

from .lightning_modules import (  # noqa: E402
    handle_of_earlier_fit,
    hugging_face_model,
    only_objective,
    refuse_attached,
)
from .window import count_window  # noqa: E402

SIDECAR = "nitp_objective"


class ObjectiveCallback(Callback):
    """Counts, steps, logs, checks and saves the objective of a LightningModule.

    * Losses divide by the counts of the window of ``accumulate_grad_batches`` batches, over all
      ranks: the batches of a window are read ahead of its first one, up to the end of the epoch and
      no further. What ``training_step`` returns is ``accumulate_grad_batches`` times its
      contribution, since Lightning divides by that number; any other loss is averaged.
    * Scheduled weights follow ``trainer.global_step``.
    * Own parameters are there before ``configure_optimizers``; one that no optimizer holds is an
      error before step 0. They are saved beside the model in full checkpoints, under
      "nitp_objective", never in its weights.
    * The parts of the loss are logged as ``objective/<name>``, those of the last window, every
      ``log_every_n_steps``.

    Args:
        spec: the objective of the Hugging Face model inside the module, see `attach`. None: the
            module holds a `CompositeObjective` of its own.
        model: name of the Hugging Face model in the module; not needed for the only one.
        streams: makes the token streams of a batch as the data loader yields it (on the host). Not
            needed where batches are what a Hugging Face model is called with.
        label_layout, seed, backend: as in `attach`.

    Raises:
        ValueError, TypeError: (when fitting starts) no model or no objective, or more than one;
            manual optimization; a strategy that accumulates by itself; streams that are required
            and not provided.

    Example:
        >>> ObjectiveCallback("ntp + 0.8*nitp").spec
        'ntp + 0.8*nitp'
    """

    def __init__(
        self,
        spec: SpecLike | None = None,
        *,
        model: str | None = None,
        streams: Callable[[Any], Streams] | None = None,
        label_layout: LabelLayout = "document",
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        self.spec, self.model, self.streams = spec, model, streams
        self.label_layout: LabelLayout = label_layout
        self.seed, self.backend = seed, backend
        self.handle: Handle | None = None
        self.objective: CompositeObjective | None = None
        self._counts: Counts | None = None
        self._metrics: Metrics | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                "lightning: automatic_optimization is False, expected True (or objective.count "
                "and counts= by hand)"
            )
        if trainer.strategy.handles_gradient_accumulation and trainer.accumulate_grad_batches > 1:
            got = type(trainer.strategy).__name__
            raise ValueError(
                f"lightning: {got} accumulates by itself, expected accumulate_grad_batches=1 with "
                "it"
            )
        if self.spec is None:
            refuse_attached(pl_module)
            self.objective = only_objective(pl_module)
            if self.streams is None:
                raise TypeError(
                    "lightning: streams is None, expected a function (the module builds streams "
                    "itself)"
                )
        else:
            inside = (
                pl_module.get_submodule(self.model) if self.model else hugging_face_model(pl_module)
            )
            self.handle = handle_of_earlier_fit(inside, self.spec)
            if self.handle is None:
                options: dict[str, Any] = {"seed": self.seed, "backend": self.backend}
                self.handle = attach(inside, self.spec, label_layout=self.label_layout, **options)
            self.handle.label_layout = self.label_layout
            self.objective = self.handle.objective
            check_streams(
                "lightning", self.handle.objective.requires, (*STREAMS, "external[aux_loss]")
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_optimizers("lightning", pl_module, self._own(), trainer.optimizers)
        self._leave()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._leave()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        steps = trainer.accumulate_grad_batches
        if batch_idx % steps == 0 or self._counts is None:
            ahead = min(steps - 1 - batch_idx % steps, trainer.num_training_batches - 1 - batch_idx)
            window = [batch, *_upcoming(trainer, int(ahead))]
            counted = (self._own().count(self._tokens(each)) for each in window)
            self._counts = count_window(counted, divisor=steps, device=pl_module.device)
            self._metrics = None
        if self.handle is not None:
            self.handle.set_counts(self._counts)
            self.handle.set_step(trainer.global_step)
            self.handle.metrics = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.handle is not None:
            self._add(self.handle.metrics)
            self.handle.set_counts(None)
        last = trainer.is_last_batch or batch_idx + 1 == trainer.num_training_batches
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not last:
            return
        self._counts = None
        if self._metrics is None:
            raise RuntimeError(
                "lightning: training_step computed no objective, expected model(**batch) with "
                "labels"
            )
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            values = {
                f"objective/{name}": value
                for name, value in self._metrics.all_reduce().compute().items()
            }
            pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.handle is not None:
            objective = self.handle.objective
            checkpoint[SIDECAR] = {
                "spec": objective.spec.to_dict(),
                "parameters": dict(objective.state_dict()),
            }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.handle is None:
            return
        if SIDECAR not in checkpoint:
            raise ValueError(
                f"lightning: the checkpoint has no {SIDECAR}, expected one that this callback "
                "took part in"
            )
        got, expected = checkpoint[SIDECAR]["spec"], self.handle.objective.spec.to_dict()
        if got != expected:
            raise ValueError(f"lightning: the checkpoint has the spec {got}, expected {expected}")
        self.handle.objective.load_state_dict(checkpoint[SIDECAR]["parameters"])

    def loss(self, trainer: Trainer, streams: Streams) -> Output:
        """Loss and metrics of one batch of the window that is being trained on."""
        if self._counts is None:
            raise RuntimeError(
                "lightning: objective_loss outside a training batch, expected it in training_step"
            )
        out = self._own()(streams, counts=self._counts, step=trainer.global_step)
        self._add(out.metrics)
        return out

    def _leave(self) -> None:
        """Nothing of a window is left to the next fit, or to a pass outside of one."""
        self._counts = self._metrics = None
        if self.handle is not None:
            self.handle.set_counts(None)

    def _add(self, metrics: Metrics | None) -> None:
        if metrics is not None:
            self._metrics = metrics if self._metrics is None else self._metrics + metrics

    def _own(self) -> CompositeObjective:
        assert self.objective is not None
        return self.objective

    def _tokens(self, batch: Any) -> Streams:
        if self.streams is not None:
            return self.streams(batch)
        if not hasattr(batch, "keys"):
            raise TypeError(
                f"lightning: a batch is a {type(batch).__name__}, expected a mapping, "
                "or streams=function"
            )
        assert self.handle is not None  # else `setup` required streams
        return self.handle.tokens(batch)


def objective_loss(module: LightningModule, streams: Streams) -> Tensor:
    """The loss that `training_step` returns, in a module that builds its own streams and holds its
    own objective.

    Outside training (validation, say) call the objective itself.

    Raises:
        ValueError: the trainer has no `ObjectiveCallback`.
    """
    callbacks = [each for each in module.trainer.callbacks if isinstance(each, ObjectiveCallback)]  # type: ignore[attr-defined]
    if len(callbacks) != 1:
        raise ValueError(
            f"lightning: the trainer has {len(callbacks)} ObjectiveCallbacks, expected one"
        )
    return callbacks[0].loss(module.trainer, streams).loss


class _Ahead(Iterator[Any]):
    """An iterator whose next items can be seen before they are taken."""

    def __init__(self, items: Iterator[Any]) -> None:
        self.items, self.seen = items, deque[Any]()

    def __next__(self) -> Any:
        return self.seen.popleft() if self.seen else next(self.items)

    def peek(self, count: int) -> list[Any]:
        # never iter(self.items): Lightning's loader would begin again
        while len(self.seen) < count and (item := next(self.items, None)) is not None:
            self.seen.append(item)
        return list(islice(self.seen, count))


def _upcoming(trainer: Trainer, count: int) -> list[Any]:
    """The next batches of the epoch, as many as there are up to ``count``; they stay where they
    are."""
    if count == 0:
        return []
    fetcher: Any = trainer.fit_loop._data_fetcher  # no public name offers the batches to come
    if not hasattr(fetcher, "batches"):
        raise TypeError(
            "lightning: training_step takes dataloader_iter, expected batch (a window "
            "is read ahead)"
        )
    if not isinstance(fetcher.iterator, _Ahead):
        fetcher.iterator = _Ahead(fetcher.iterator)
    fetched = [*fetcher.batches]  # what Lightning prefetched from a loader without a length
    return [item[0] for item in [*fetched, *fetcher.iterator.peek(count - len(fetched))][:count]]
