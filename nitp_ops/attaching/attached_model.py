"""What `attach` saw of a model and what must still hold in every training pass: each change is
refused by its name."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nitp_ops.core.checks import is_dtensor
from nitp_ops.objectives import CompositeObjective

from .attached_forward import AttachedForward
from .inspection.hugging_face import active_copy, is_linear_call, refuse_hooks_on_head
from .inspection.logit_settings import LogitSettings
from .tapping import Tap

OBJECTIVE = "nitp_objective"
_DETACH = "(handle.detach() first)"
_AGAIN = f"expected attach after that change {_DETACH}"


class AttachedModel:
    """The model as it was at attach.

    Args:
        plain: the Hugging Face model. objective: attached to it. tap: collects its streams.
    """

    def __init__(self, plain: Any, objective: CompositeObjective, tap: Tap) -> None:
        self._objective, blocks = objective, tap.counted_blocks()
        self._read = _paths(plain, [*tap.modules(), *blocks])
        self._list = _list_of(plain, blocks)
        info = objective.info
        self._sizes = (info.vocab_size, info.hidden_size)
        self._bias = getattr(tap.sites.head, "bias", None) is not None
        self._ties = _ties(plain)
        self._class_forward = _name(type(plain).forward)
        self._settings = LogitSettings(plain, tap.sites, info)

    def check(self, head: nn.Module | None) -> None:
        """Before a training pass; torch.compile traces this, and compiles anew where what it reads has changed.

        Args:
            head: the head that computes now.

        Raises:
            ValueError: an own parameter is frozen or on the meta device; the head has other sizes
                or is no linear any more.
        """
        self._check_head(head)
        check_parameters(self._objective, head)

    def check_ties(self, plain: Any) -> None:
        """After the other two, which say more of a head that was replaced; torch.compile traces
        this too.

        Raises:
            ValueError: parameters that were tied are no longer one.
        """
        for first, second in self._ties:
            ends = _parameter(plain, first), _parameter(plain, second)
            # an adapter that was deleted leaves no end
            if ends[0] is not ends[1] and all(end is not None for end in ends):
                raise ValueError(
                    f"attach: {first} and {second} were one parameter at attach and are two, "
                    "expected one (to_empty and load_state_dict(assign=True) untie: "
                    "model.tie_weights() after them, before fully_shard)"
                )

    def check_untraced(self, plain: Any, head: nn.Module) -> None:
        """The rest of it, which torch.compile can not trace.

        Args:
            plain: the model. head: its output embeddings now.

        Raises:
            ValueError: somebody has hooks on the head, or its call is no longer that of a linear;
                modules that streams pass were replaced; the logits have another softcap or scale.
        """
        refuse_hooks_on_head(head)
        computing = active_copy(head)
        assert computing is not None
        self._check_call(computing)
        self._check_modules(plain)
        self._settings.check(plain)

    def check_forward(self, plain: Any) -> None:
        """Before a training call of the model; a forward that is wrapped around the attached one is
        fine.

        Raises:
            ValueError: the forward of the class was replaced, or the model's own by Liger-Kernel's,
                which has a loss.
        """
        forward = plain.__dict__.get("forward")
        if isinstance(forward, AttachedForward):
            name = _name(type(plain).forward)
            replaced = not forward.is_of_instance and name != self._class_forward
        else:
            name = _name(forward)
            replaced = name.startswith("liger_kernel.")
        if replaced:
            raise ValueError(
                f"attach: model.forward was replaced by {name}, expected attach after that "
                "replacement (Liger-Kernel: apply it before attach, or with "
                "fused_linear_cross_entropy=False)"
            )

    def check_loss(self, plain: Any, handle: Any) -> None:
        """Before a training call: what stands for ``model.loss_function`` is the handle's.

        Raises:
            ValueError: it was replaced; its value would be added to the objective.
        """
        own = plain.__dict__.get("_loss_function")
        if own is not None and getattr(own, "__self__", None) is not handle:
            raise ValueError(
                f"attach: model.loss_function was replaced by {_name(own)}, expected attach after "
                "that replacement (in training the objective is the loss)"
            )

    def _check_head(self, head: nn.Module | None) -> None:
        weight: Any = getattr(head, "weight", None)
        biased = getattr(head, "bias", None) is not None
        same = getattr(weight, "shape", None) == self._sizes
        kind = type(head).__name__
        if head is not None and (
            inside := [name for name, module in head._modules.items() if module is not None]
        ):
            got = f"is a {kind} with submodules {', '.join(inside)}"
            more = (
                "compile the model, not its head" if "_orig_mod" in inside else "an adapter is more"
            )
            raise ValueError(f"attach: the model's head {got}, expected a plain linear ({more})")
        # of the weight first: PEFT's tied copy of a head names them the other way round, ZeRO-3
        # empties the weight
        sizes = tuple(getattr(head, name, None) for name in ("out_features", "in_features"))
        same = same or sizes == self._sizes
        if same and biased == self._bias:
            return
        before = (
            f"{self._sizes[0]} x {self._sizes[1]}{' with a bias' if self._bias else ''} at attach"
        )
        if not same:
            got = f"is a {kind}" if None in sizes else f"was resized to {sizes[0]} x {sizes[1]}"
            raise ValueError(
                f"attach: the model's head {got}, it was {before}, expected attach after "
                f"resizing {_DETACH}"
            )
        got = "a bias" if biased else "no bias"
        raise ValueError(f"attach: the model's head has {got}, it was {before}, {_AGAIN}")

    def _check_call(self, head: nn.Module) -> None:
        weight: Any = getattr(head, "weight", None)
        wrapped = bool(is_traceable_wrapper_subclass(weight)) and not is_dtensor(weight)
        if wrapped or not weight.is_floating_point():
            got = type(weight).__name__ if wrapped else str(weight.dtype)
            raise ValueError(
                f"attach: the model's head has a weight of {got}, expected a plain floating point "
                "tensor as at attach (a quantised head gets no gradient)"
            )
        if is_linear_call(head):
            return
        own = head.__dict__.get("forward")
        got = (
            f"is a {_name(type(head))}"
            if own is None
            else f"had its forward replaced by {_name(own)}"
        )
        raise ValueError(
            f"attach: the model's head {got}, expected a plain linear as at attach: undo that "
            "change (in training the weight is read and no forward of the head is called; softcap "
            "and logit scale belong to the model's)"
        )

    def _check_modules(self, plain: Any) -> None:
        moved = [module for path, module in self._read if _module(plain, path) is not module]
        present = {id(module) for module in plain.modules()} if moved else ()
        gone = [module for module in moved if id(module) not in present]
        if gone:
            raise ValueError(
                f"attach: a {type(gone[0]).__name__} that streams pass is no part of the model "
                f"any more, {_AGAIN}"
            )
        path, before = self._list
        blocks = _module(plain, path.split(".")) if before else None
        now = 0 if blocks is None else len(list(blocks.children()))
        if now != before:
            raise ValueError(
                f"attach: the model has {now} blocks, at attach it had {before}, {_AGAIN}"
            )


def _list_of(plain: nn.Module, blocks: tuple[nn.Module, ...]) -> tuple[str, int]:
    """(path, length) of the list that holds the blocks; ("", 0) where none does."""
    for path, module in plain.named_modules():
        if (
            blocks
            and isinstance(module, nn.ModuleList)
            and any(child is blocks[0] for child in module)
        ):
            return path, len(module)
    return "", 0


def check_parameters(objective: CompositeObjective, head: nn.Module | None = None) -> None:
    """See that the own parameters can be trained.

    Raises:
        ValueError: one is frozen, or on the meta device where the head is not.
    """
    if not objective.terms:
        return
    on_meta = getattr(getattr(head, "weight", None), "is_meta", False)
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            expected = "expected it to be trained (PEFT freezes what it finds: attach after it)"
            raise ValueError(f"attach: {OBJECTIVE}.{name} is frozen, {expected}")
        if parameter.is_meta and not on_meta:
            expected = f"expected values: model.{OBJECTIVE}.materialize(device)"
            raise ValueError(f"attach: {OBJECTIVE}.{name} is on the meta device, {expected}")


def _paths(plain: nn.Module, modules: list[nn.Module]) -> list[tuple[list[str], nn.Module]]:
    """The modules, each with the path to it."""
    paths = {id(module): path for path, module in plain.named_modules()}
    return [(paths[id(module)].split("."), module) for module in modules]


def _module(plain: nn.Module, path: list[str]) -> nn.Module | None:
    """What stands at a path now."""
    here: nn.Module | None = plain
    for name in path:
        here = None if here is None else here._modules.get(name)
    return here


def _ties(plain: nn.Module) -> list[tuple[str, str]]:
    """Pairs of names of one parameter: names, for a module may be replaced by another."""
    first: dict[int, str] = {}
    named = [
        (name, id(parameter)) for name, parameter in plain.named_parameters(remove_duplicate=False)
    ]
    return [
        (one, name)
        for name, parameter in named
        if (one := first.setdefault(parameter, name)) != name
    ]


def _parameter(plain: nn.Module, path: str) -> Any:
    """What the model holds there now, None where it holds nothing."""
    here: Any = plain
    for name in path.split("."):
        here = getattr(here, name, None)
    return here


def _name(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
