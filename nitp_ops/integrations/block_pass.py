"""Whether the blocks and the final norm that were found by structure are those that a forward pass runs.

The body runs once on a few ids with every block replaced by a function that returns its input: no block computes
anything, and the calls say which modules a training pass will run, how often and on what shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .routing import first_tensor, routed
from .sites import Sites, block_lists, final_norm, head_shape, text_config

_TOKENS = 4
#: What the blocks of transformers return: the stream alone, or with one or two things beside it.
_FORMS: tuple[Callable[[Tensor | None], Any], ...] = (lambda x: x, lambda x: (x, None), lambda x: (x, None, None))


@dataclass
class _Pass:
    """The calls of one pass, in order: (index of the block, its input); (blocks run so far, the norm's input)."""

    blocks: list[tuple[int, Tensor | None]] = field(default_factory=list)
    norm: list[tuple[int, Tensor | None]] = field(default_factory=list)
    complete: bool = False


def checked_blocks(model: Any, sites: Sites) -> tuple[Sites, dict[str, str]]:
    """`sites` with the blocks and the norm that a pass runs, and by site the reason why one is missing.

    Where the body does not run on ids alone nothing can be said: `sites` come back as they are, without reasons.
    """
    assert isinstance(sites.head, nn.Linear)
    if dropped := getattr(text_config(model), "layerdrop", None):
        reason = f"its layerdrop is {dropped}, so that training passes leave blocks out"
        return replace(sites, blocks=None, norm=None), {"blocks": reason, "norm": reason}
    shape = (1, _TOKENS, head_shape(sites.head)[1])
    for owner, blocks in block_lists(model):
        found = replace(sites, blocks=blocks, norm=final_norm(model, owner), owner=owner)
        seen = _run(found, shape)
        if not seen.complete and all(_is_stream(came, shape) for _, came in seen.blocks):
            return sites, {}
        if not seen.blocks:
            continue  # of a tower that a pass on text leaves out
        if reason := _blocks_reason(len(blocks), seen, shape):
            return replace(sites, blocks=None, norm=None), {"blocks": reason, "norm": reason}
        reason = _norm_reason(found, seen, shape)
        return (replace(found, norm=None), {"norm": reason}) if reason else (found, {})
    reason = "none of its lists of modules runs in a pass"
    return replace(sites, blocks=None, norm=None), {"blocks": reason, "norm": reason}


def check_required(requires: Iterable[str], blocks: int, reasons: Mapping[str, str], kind: str) -> None:
    """See that no required stream passes a site that is missing for a reason.

    Args:
        requires: names of streams. blocks: how many there are. reasons: see `checked_blocks`. kind: of the model.

    Raises:
        ValueError: one does; the reason is named.
    """
    for name in sorted(requires):
        after_all = name in ("last_residual", f"hidden_states[{blocks}]")
        site = "norm" if after_all else "blocks" if name.startswith("hidden_states[") else None
        if site is not None and site in reasons:
            raise ValueError(
                f"attach: {name} is required, but the {kind} does not offer it: {reasons[site]}; "
                "leave it out of the spec, or collect it with tap"
            )


def _blocks_reason(count: int, seen: _Pass, shape: tuple[int, ...]) -> str | None:
    wrong = [came for _, came in seen.blocks if not _is_stream(came, shape)]
    if wrong:
        return f"its blocks receive {_named(wrong[0])}, expected {shape}, one stream of the width that the head reads"
    if [block for block, _ in seen.blocks] != list(range(count)):
        return f"its {count} blocks run {len(seen.blocks)} times in a pass, expected each once and in order"
    return None


def _norm_reason(sites: Sites, seen: _Pass, shape: tuple[int, ...]) -> str | None:
    if sites.norm is None:
        return "there is no final norm beside its blocks"
    if [after for after, _ in seen.norm] != [len(seen.blocks)]:
        return f"its final norm runs {len(seen.norm)} times in a pass, expected once, after the last block"
    last = seen.norm[0][1]
    return None if _is_stream(last, shape) else f"its final norm receives {_named(last)}, expected {shape}"


def _is_stream(value: Tensor | None, shape: tuple[int, ...]) -> bool:
    return value is not None and value.is_floating_point() and tuple(value.shape) == shape


def _named(value: Tensor | None) -> str:
    return "no tensor" if value is None else f"a tensor of shape {tuple(value.shape)}"


def _run(sites: Sites, shape: tuple[int, ...]) -> _Pass:
    """The pass in the form that the model's blocks have, or what came before it failed."""
    passes = []
    for form in _FORMS:
        seen = _Pass()
        try:
            _pass(sites, form, seen)
        except Exception:
            passes.append(seen)
            continue
        seen.complete = True
        # a tuple taken for a tensor loses its first dimension, a tensor taken for a tuple is none
        if len({came.shape if came is not None else None for _, came in seen.blocks}) <= 1:
            return seen
        passes.append(seen)
    return passes[0]


def _pass(sites: Sites, form: Callable[[Tensor | None], Any], seen: _Pass) -> None:
    assert sites.blocks is not None and sites.trunk is not None and sites.embed is not None

    def block(k: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            came = first_tensor(args, kwargs)
            seen.blocks.append((k, came))
            return form(came)

        return forward

    def norm(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.norm.append((len(seen.blocks), first_tensor(args, kwargs)))

    device = next(sites.embed.parameters()).device
    ids = torch.ones(1, _TOKENS, dtype=torch.long, device=device)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_same_random_state(device))
        for k, module in enumerate(sites.blocks):
            stack.enter_context(routed(module, block(k)))
        if sites.norm is not None:
            stack.callback(sites.norm.register_forward_pre_hook(norm, with_kwargs=True).remove)
        sites.trunk(input_ids=ids, use_cache=False)


@contextmanager
def _same_random_state(device: torch.device) -> Iterator[None]:
    """Dropout of the embeddings draws numbers here that training must not miss."""
    if device.type in ("cpu", "meta"):
        with torch.random.fork_rng([]):
            yield
    else:
        with torch.random.fork_rng([device], device_type=device.type):
            yield
