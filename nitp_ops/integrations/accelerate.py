"""A plain loop with Accelerate: the counts of each accumulation window before its first forward pass.

    accumulation = Accumulation(accelerator, nitp_ops.attach(model, "ntp + 0.8*nitp"))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in accumulation(loader):
        with accelerator.accumulate(model):
            accumulation.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()

Losses of microbatches and ranks add up to that of the window, for every term, however the masks fall.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from nitp_ops.objectives import Counts

from .handle import Handle
from .window import StepLog, count_window

_PARALLEL = ("tp_size", "cp_size", "sp_size")
_PROVIDED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_HPU")


def data_parallel_only(accelerator: Accelerator, who: str) -> None:
    """Raise NotImplementedError where ranks hold anything but other rows of the same batch."""
    kind = accelerator.distributed_type.value
    if kind not in _PROVIDED:
        raise NotImplementedError(f"{who}: the distributed type is {kind}, expected one process or DDP")
    sizes = {name: getattr(accelerator.parallelism_config, name, 1) for name in _PARALLEL}
    if max(sizes.values()) > 1:
        raise NotImplementedError(f"{who}: the parallelism is {sizes}, expected data parallelism alone")


class Accumulation:
    """Windows of ``accelerator.gradient_accumulation_steps`` microbatches, for a loop with ``accelerator.accumulate``.

    Reads a window of batches ahead, counts every term over it and over all ranks (one collective), then hands the
    batches out one by one: losses of microbatches and ranks add up to that of the window. The last window of a loader
    may be short, as in Accelerate.

    Register it with ``accelerator.register_for_checkpointing``: `save_state` then keeps the own parameters, the spec
    and the step, and `load_state` refuses a folder without them, or of another spec.

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
            raise ValueError("Accumulation: sync_with_dataloader is False, expected True (no window spans two loaders)")
        self.accelerator, self.handle, self.step = accelerator, handle, 0
        self._counts: Counts | None = None
        self._log, self._logged_step = StepLog(handle.objective.spec), 0

    def __call__(self, loader: Any) -> Iterator[Any]:
        """The batches of a loader that ``accelerator.prepare`` returned.

        Raises:
            TypeError: another loader, which does not say where it ends.
        """
        if not hasattr(loader, "end_of_dataloader"):
            raise TypeError(f"Accumulation: loader is a {type(loader).__name__}, expected one from accelerator.prepare")
        batches = iter(loader)
        try:
            while window := self._read_window(loader, batches):
                last = loader.end_of_dataloader
                self._counts = count_window(self.handle, window)
                self.handle.set_counts(self._counts)
                self.handle.set_step(self.step)
                for index, batch in enumerate(window, start=1):
                    # accelerate synchronises gradients wherever this is set, and reading ahead has set it too early
                    loader.end_of_dataloader = last and index == len(window)
                    yield batch
        finally:
            self._counts = None
            self.handle.set_counts(None)

    def _read_window(self, loader: Any, batches: Iterator[Any]) -> list[Any]:
        window = []
        for batch in batches:
            window.append(batch)
            # asked for more than it has, a loader would forget that it is at its end
            if loader.end_of_dataloader or len(window) == self.accelerator.gradient_accumulation_steps:
                break
        return window

    def backward(self, loss: Tensor) -> None:
        """``accelerator.backward`` without its division by the accumulation steps: the counts are the window's."""
        if self._counts is None:
            raise RuntimeError(
                "Accumulation: backward is called outside of the loop, expected batches of accumulation(loader)"
            )
        self._log.add(self.handle.metrics, self._counts)
        self.accelerator.backward(loss * self.accelerator.gradient_accumulation_steps)
        self.step += self.accelerator.sync_gradients

    def take_log(self) -> dict[str, float]:
        """``loss``, ``loss/ntp``, ... and what the terms measured since the last call, over all ranks: see `StepLog`.

        Every rank calls it, between two windows, for instance where ``accelerator.sync_gradients`` is true.
        """
        steps, self._logged_step = self.step - self._logged_step, self.step
        return self._log.take(steps)

    def state_dict(self) -> dict[str, Any]:
        """The own parameters, the spec and the step."""
        objective = self.handle.objective
        return {"spec": objective.spec.to_dict(), "parameters": objective.state_dict(), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse.

        Raises:
            ValueError: the state is of another spec.
        """
        objective = self.handle.objective
        if state["spec"] != objective.spec.to_dict():
            raise ValueError(
                f"Accumulation: the state has the spec {state['spec']}, expected {objective.spec.to_dict()}"
            )
        objective.load_state_dict(state["parameters"])
        self.step = self._logged_step = state["step"]
