"""A plain loop with Accelerate: the counts of each accumulation window before its first forward
pass.

    accumulation = Accumulation(accelerator, nitp_ops.attach(model, "ntp + 0.8*nitp"))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in accumulation(loader):
        with accelerator.accumulate(model):
            accumulation.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()

Losses of microbatches and ranks average to that of the window, for every term, however the masks
fall.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from nitp_ops.attaching.handle import Handle
from nitp_ops.objectives import Counts

from .window import StepLog, count_window

_PARALLEL = ("tp_size", "cp_size", "sp_size")
_PROVIDED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_HPU")


def data_parallel_only(accelerator: Accelerator, who: str) -> None:
    """Raise NotImplementedError where ranks hold anything but other rows of the same batch."""
    kind = accelerator.distributed_type.value
    if kind not in _PROVIDED:
        raise NotImplementedError(
            f"{who}: the distributed type is {kind}, expected one process or DDP"
        )
    sizes = {name: getattr(accelerator.parallelism_config, name, 1) for name in _PARALLEL}
    if max(sizes.values()) > 1:
        raise NotImplementedError(
            f"{who}: the parallelism is {sizes}, expected data parallelism alone"
        )


class Accumulation:
    """Windows of ``accelerator.gradient_accumulation_steps`` microbatches, for a loop with
    ``accelerator.accumulate``.

    Reads a window of batches ahead, counts every term over it and over all ranks (one collective),
    then hands the batches out one by one. The loss of a pass is ``gradient_accumulation_steps``
    times its contribution, because Accelerate divides by that number: any other loss that joins it
    is averaged, as without an objective. The last window of a loader may be short, as in
    Accelerate.

    A loop that ends inside a window takes no step for it: gradients and log of its microbatches are
    dropped before the next window, which begins anew.

    Register it with ``accelerator.register_for_checkpointing``: `save_state` then keeps the own
    parameters, the spec and the step, and `load_state` refuses a folder without them, or of another
    spec.

    Args:
        accelerator: one process or data parallel.
        handle: of the attached model; attach before ``accelerator.prepare``, which wraps the model.

    Attributes:
        step: optimizer steps done; scheduled weights follow it.

    Raises:
        NotImplementedError: tensor, context or sequence parallelism, FSDP, DeepSpeed.
        ValueError: ``sync_with_dataloader=False``: windows would span two loaders.
    """

    def __init__(self, accelerator: Accelerator, handle: Handle) -> None:
        data_parallel_only(accelerator, "Accumulation")
        if not accelerator.gradient_state.sync_with_dataloader:
            raise ValueError(
                "Accumulation: sync_with_dataloader is False, expected True (no window spans two "
                "loaders)"
            )
        self.accelerator, self.handle, self.step = accelerator, handle, 0
        self._counts: Counts | None = None
        self._log = StepLog(handle.objective.spec)

    def __call__(self, loader: Any) -> Iterator[Any]:
        """The batches of a loader that ``accelerator.prepare`` returned.

        Raises:
            TypeError: another loader, which does not say where it ends.
        """
        if not hasattr(loader, "end_of_dataloader"):
            raise TypeError(
                f"Accumulation: loader is a {type(loader).__name__}, expected one from "
                "accelerator.prepare"
            )
        batches = iter(loader)
        counts = None
        try:
            while window := self._read_window(loader, batches):
                last = loader.end_of_dataloader
                counts = self._begin(window)
                for index, batch in enumerate(window):
                    # accelerate synchronises gradients wherever this is set, and reading ahead has
                    # set it too early
                    loader.end_of_dataloader = last and index == len(window) - 1
                    # it would count on where a loop was left, and stand still where a batch is
                    # skipped
                    self.accelerator.step = index
                    yield batch
        finally:
            if self._counts is counts:  # else another loop has begun since this one was left
                self._end()

    def _begin(self, window: list[Any]) -> Counts:
        if self._log.drop():
            # that of accelerate's optimizers does nothing inside a window
            self.handle._model.zero_grad()
        steps = self.accelerator.gradient_accumulation_steps
        self._counts = count_window(map(self.handle.count, window), divisor=steps)
        self.handle.set_counts(self._counts)
        self.handle.set_step(self.step)
        return self._counts

    def _end(self) -> None:
        self._counts = None
        self.handle.set_counts(None)

    def _read_window(self, loader: Any, batches: Iterator[Any]) -> list[Any]:
        window = []
        for batch in batches:
            window.append(batch)
            # read past its end, a loader would forget that it is at its end
            if (
                loader.end_of_dataloader
                or len(window) == self.accelerator.gradient_accumulation_steps
            ):
                break
        return window

    def backward(self, loss: Tensor) -> None:
        """``accelerator.backward``, and the log and the step of the window."""
        if self._counts is None:
            raise RuntimeError(
                "Accumulation: backward is called outside of the loop, expected batches of "
                "accumulation(loader)"
            )
        self._log.add(self.handle.metrics, self._counts)
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            self._log.step()
            self._end()
            self.step += 1

    def take_log(self) -> dict[str, float]:
        """``loss``, ``loss/ntp``, ... and what the terms measured in the steps since the last call,
        see `StepLog`.

        Over all ranks; every rank calls it, for instance where ``accelerator.sync_gradients`` is
        true. Empty where no step was taken.
        """
        return self._log.take()

    def state_dict(self) -> dict[str, Any]:
        """The own parameters, the spec and the step."""
        objective = self.handle.objective
        return {
            "spec": objective.spec.to_dict(),
            "parameters": objective.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse.

        Raises:
            ValueError: the state is of another spec.
        """
        objective = self.handle.objective
        if state["spec"] != objective.spec.to_dict():
            raise ValueError(
                f"Accumulation: the state has the spec {state['spec']}, expected "
                f"{objective.spec.to_dict()}"
            )
        objective.load_state_dict(state["parameters"])
        self.step = state["step"]
