"""Collecting the streams of a forward pass with hooks on an ordinary module tree."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nitp_ops.engine.streams.needs import checked, named, reads
from nitp_ops.objectives import CompositeObjective, Need, Streams

from .hook_points import BlocksLike, ModuleLike, Sites, named_sites
from .inspection.routing import first_tensor


def tap(
    model: nn.Module,
    requires: CompositeObjective | Iterable[Need],
    *,
    blocks: BlocksLike | None = None,
    norm: ModuleLike | None = None,
    embed: ModuleLike | None = None,
    head: ModuleLike | None = None,
) -> Tap:
    """A context that collects exactly the required streams of the forward pass inside it, without a
    copy.

    * ``last_hidden``: what the final norm returns; ``last_residual``: what it receives;
    * ``hidden_states[k]``: the residual stream after k blocks, 0 the embedding output: what block k
      + 1 receives (the final norm, after the last block);
    * ``head``, ``embed``: the modules.

    Each is detached at once, unless a `Need` wants its gradient.

    Args:
        model: the module tree that the forward pass runs through.
        requires: an objective, or needs of streams (``objective.requires``).
        blocks: the transformer blocks in order, or the name of their list. norm, embed, head: the
            final norm, the embedding and the unembedding, or their names. In a Hugging Face model
            all are found by structure.

    Raises:
        TypeError, ValueError: a name that the model does not have; no module for a required stream.
        RuntimeError: (when the context ends) a stream did not pass; (inside) it passed twice.

    Example:
        >>> from nitp_ops.objectives import ModelInfo, build
        >>> blocks = [nn.Linear(8, 8), nn.Linear(8, 8)]
        >>> model = nn.Sequential(nn.Embedding(16, 8), *blocks, nn.LayerNorm(8), nn.Linear(8, 16))
        >>> objective = build("ntp + nitp(target_layer=1)", model=ModelInfo(hidden_size=8, vocab_size=16, num_layers=2))
        >>> tapped = tap(model, objective, blocks=blocks, norm="3", head="4")
        >>> ids = torch.randint(16, (2, 5))
        >>> with tapped:
        ...     logits = model(ids)
        >>> objective(tapped.streams(token_ids=ids)).loss.backward()
    """
    sites = named_sites(model, blocks=blocks, norm=norm, embed=embed, head=head)
    needs = requires.requires if isinstance(requires, CompositeObjective) else requires  # type: ignore[union-attr]
    return Tap(sites, needs)


class Tap:
    """What `tap` returns. Use it as a context for each forward pass; `streams` then hands out what
    it collected.

    Hooks are registered when the context is entered and removed when it is left. A model that is
    compiled needs them
    before: `install` registers them for good (torch.compile ignores hooks that come later),
        `remove` ends that.

    Args:
        sites: modules that the streams pass. requires: the streams. who: the function that the user
            called, for errors.
    """

    def __init__(self, sites: Sites, requires: Iterable[Need], *, who: str = "tap") -> None:
        self.sites, self.requires, self.who = sites, checked(who, requires), who
        self._differentiable = {str(need) for need in self.requires if need.grad}
        self.collecting = False
        self._found: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._temporary = self._handed_out = False
        self._states = {str(need): need.layer for need in self.requires if need.layer is not None}
        self._given = [name for name in ("head", "embed") if reads(self.requires, name)]
        self._points = [
            point for name in named(self.requires) if (point := self._point(name)) is not None
        ]

    def install(self) -> Tap:
        """Register the hooks until `remove`; they do nothing outside the context."""
        if not self._handles:
            for name, module, output in self._points:
                if output:
                    handle = module.register_forward_hook(partial(self._returned, name))
                else:
                    handle = module.register_forward_pre_hook(
                        partial(self._received, name), with_kwargs=True
                    )
                self._handles.append(handle)
        return self

    def modules(self) -> list[nn.Module]:
        """The modules that carry the hooks."""
        return [module for _, module, _ in self._points]

    def counted_blocks(self) -> tuple[nn.Module, ...]:
        """All blocks, where the number of a hidden state among the streams counts them; else none."""
        return (self.sites.blocks or ()) if self._states else ()

    def remove(self) -> None:
        """Take the hooks away and forget what they collected."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._found.clear()

    def __enter__(self) -> Tap:
        self._temporary = not self._handles
        self.install()
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self.stop()
        if self._temporary:
            found, self._found = self._found, {}
            self.remove()
            self._found = found
        if kind is None and not self._handed_out:
            self._check_complete()

    def start(self) -> None:
        """Collect what passes from now on; torch.compile traces this and `stop`, but no context.

        A head that is called on no rows, so that no logits are built, runs no hook until `stop`:
        the objective calls it once more, and an engine that sees two calls in a step frees
        parameters of its group after the first.
        """
        if not torch.compiler.is_compiling():
            self._see_last()
        self._found, self._handed_out = {}, False
        self.collecting = True
        if self.sites.head is not None:
            self.sites.head._call_impl = partial(_unless_empty, self.sites.head)

    def _see_last(self) -> None:
        """A hook that was added after ours may change what the head, or the next block, reads."""
        for handle in self._handles:
            hooks = handle.hooks_dict_ref()
            if hooks is not None:
                hooks.move_to_end(handle.id)

    def stop(self) -> None:
        """Collect no more."""
        self.collecting = False
        if self.sites.head is not None:
            self.sites.head.__dict__.pop("_call_impl", None)

    def streams(self, **fields: Any) -> Streams:
        """`Streams` of the pass: what was collected, the modules, and the token streams given by
        keyword.

        What was collected is handed out once, so that it is freed with the step.

        Raises:
            RuntimeError: a stream did not pass.
        """
        self._check_complete()
        found = self._found
        given: dict[str, Any] = {
            "hidden_states": {k: found[name] for name, k in self._states.items()}
        }
        given |= {name: found[name] for name in ("last_hidden", "last_residual") if name in found}
        given |= {name: getattr(self.sites, name) for name in self._given}
        self._found, self._handed_out = {}, True
        return Streams(**(given | fields))

    def _check_complete(self) -> None:
        missing = [name for name, _, _ in self._points if name not in self._found]
        if missing:
            raise RuntimeError(
                f"{self.who}: {', '.join(missing)} did not pass, expected a forward pass inside "
                "the context (torch.compile ignores hooks that come after it: install() the tap "
                "first)"
            )

    def _point(self, name: str) -> tuple[str, nn.Module, bool] | None:
        """(stream, module, whether it is what the module returns), or None where no hook is needed."""
        sites = self.sites
        if name in self._states:
            if sites.blocks is None:
                raise ValueError(
                    f"{self.who}: blocks is None, expected the transformer blocks ({name} is "
                    "required)"
                )
            k, count = self._states[name], len(sites.blocks)
            if k > count:
                has = f"the model has {count} blocks"
                raise ValueError(
                    f"{self.who}: {name} is required, expected at most {count} ({has})"
                )
            return (
                (name, sites.blocks[k], False)
                if k < count
                else (name, self._needed("norm", name), False)
            )
        if name == "last_hidden":
            return name, self._needed("trunk", name), True
        if name == "last_residual":
            return name, self._needed("norm", name), False
        if name in ("head", "embed"):
            self._needed(name, name)
        return None

    def _needed(self, site: str, stream: str) -> nn.Module:
        module = getattr(self.sites, site)
        if module is None:
            argument = "norm" if site == "trunk" else site
            raise ValueError(
                f"{self.who}: {argument} is None, expected a module or its name ({stream} is "
                "required)"
            )
        return module

    def _received(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self.collecting:
            self._keep(name, first_tensor(args, kwargs))

    def _returned(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.collecting:
            first = (
                output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
            )
            self._keep(name, output[0] if first is None and isinstance(output, tuple) else first)

    def _keep(self, name: str, value: object) -> None:
        # activation checkpointing runs modules again inside backward: that is the same pass
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.who}: {name} is a {type(value).__name__}, expected a tensor")
        if name in self._found:
            raise RuntimeError(
                f"{self.who}: {name} passed twice, expected one forward pass inside the context"
            )
        self._found[name] = value if name in self._differentiable else value.detach()


def _unless_empty(head: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
    """The ``_call_impl`` of a head while a tap collects: no hook and no GEMM for no rows."""
    if isinstance(hidden, Tensor) and not hidden.numel():
        vocabulary = head.out_features if isinstance(head, nn.Linear) else head.weight.shape[0]
        return hidden.new_empty((*hidden.shape[:-1], vocabulary))
    return type(head)._call_impl(head, hidden, *args, **kwargs)
