"""Whether the blocks and the final norm that were found by structure are those that a forward pass
runs.

The body runs once on a few ids with every block replaced by a function that returns its input: no
block computes anything, and the calls say which modules a training pass will run, how often and on
what shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nitp_ops.attaching.hook_points import Sites, block_lists, final_norm, head_shape, text_config
from nitp_ops.objectives import Need

from .routing import first_tensor, routed

_TOKENS = 4
#: A pass as long as the model's longest text costs memory; longer ones are not tried.
_MOST_TOKENS = 4096
#: What the blocks of transformers return: the stream alone, or with one or two things beside it.
_FORMS: tuple[Callable[[Tensor | None], Any], ...] = (
    lambda x: x,
    lambda x: (x, None),
    lambda x: (x, None, None),
)


@dataclass
class _Pass:
    """The calls of one pass, in order: (index of the block, its input); (blocks run so far, the
    norm's input)."""

    blocks: list[tuple[int, Tensor | None]] = field(default_factory=list)
    norm: list[tuple[int, Tensor | None]] = field(default_factory=list)
    complete: bool = False
    error: str = ""


def checked_blocks(model: Any, sites: Sites) -> tuple[Sites, dict[str, str]]:
    """`sites` with the blocks and the norm that a pass runs, and by site the reason why one is
    missing.

    A body may want other lengths than a few ids, or only evaluation may take them (Reformer's axial
    positions do both). Where it runs on no ids alone, nothing is known about its blocks and none
    are offered; but on the meta device, where a body may fail for reading a value, `sites` come
    back as they are and the first step finds what is wrong.
    """
    assert isinstance(sites.head, nn.Linear) and sites.trunk is not None
    if dropped := getattr(text_config(model), "layerdrop", None):
        return _none(sites, f"its layerdrop is {dropped}, so that training passes leave blocks out")
    errors: list[str] = []
    for training in (sites.trunk.training, not sites.trunk.training):
        with _mode(sites.trunk, training):
            for tokens in _lengths(model):
                found = _seen_in_a_pass(
                    model, sites, (1, tokens, head_shape(sites.head)[1]), errors
                )
                if found is not None:
                    return found
    if sites.head.weight.is_meta:
        return sites, {}
    return _none(
        sites, f"its body runs on no ids alone, so that its blocks are not known ({errors[0]})"
    )


def _none(sites: Sites, reason: str) -> tuple[Sites, dict[str, str]]:
    return replace(sites, blocks=None, norm=None), {"blocks": reason, "norm": reason}


def _lengths(model: Any) -> list[int]:
    config = text_config(model)
    axes = getattr(config, "axial_pos_shape", None)
    longest = getattr(config, "max_position_embeddings", None)
    lengths = [
        _TOKENS,
        math.prod(axes) if axes else _TOKENS,
        longest if isinstance(longest, int) else _TOKENS,
    ]
    return [length for length in dict.fromkeys(lengths) if 0 < length <= _MOST_TOKENS]


def _seen_in_a_pass(
    model: Any, sites: Sites, shape: tuple[int, ...], errors: list[str]
) -> tuple[Sites, dict[str, str]] | None:
    """What `checked_blocks` returns, or None and one error more where the pass says nothing."""
    for owner, blocks in block_lists(model):
        found = replace(sites, blocks=blocks, norm=final_norm(model, owner), owner=owner)
        seen = _run(found, shape)
        if not seen.complete and all(_is_stream(got, shape) for _, got in seen.blocks):
            errors.append(seen.error)
            return None
        if not seen.blocks:
            continue  # of a tower that a pass on text leaves out
        if reason := _blocks_reason(len(blocks), seen, shape):
            return _none(sites, reason)
        reason = _norm_reason(found, seen, shape)
        return (replace(found, norm=None), {"norm": reason}) if reason else (found, {})
    return _none(sites, "none of its lists of modules runs in a pass")


def check_required(
    requires: Iterable[Need], blocks: int, reasons: Mapping[str, str], kind: str
) -> None:
    """See that no required stream passes a site that is missing for a reason.

    Args:
        requires: the streams. blocks: how many there are. reasons: see `checked_blocks`. kind: of
            the model.

    Raises:
        ValueError: one does; the reason is named.
    """
    for need in sorted(requires, key=str):
        after_all = need.stream == "last_residual" or need.layer == blocks
        site = "norm" if after_all else "blocks" if need.stream == "hidden_states" else None
        if site is not None and site in reasons:
            raise ValueError(
                f"attach: {need} is required, but the {kind} does not offer it: {reasons[site]}; "
                "leave it out of the spec, or collect it with tap"
            )


def _blocks_reason(count: int, seen: _Pass, shape: tuple[int, ...]) -> str | None:
    wrong = [got for _, got in seen.blocks if not _is_stream(got, shape)]
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
    return (
        None
        if _is_stream(last, shape)
        else f"its final norm receives {_named(last)}, expected {shape}"
    )


def _is_stream(value: Tensor | None, shape: tuple[int, ...]) -> bool:
    return value is not None and value.is_floating_point() and tuple(value.shape) == shape


def _named(value: Tensor | None) -> str:
    return "no tensor" if value is None else f"a tensor of shape {tuple(value.shape)}"


def _run(sites: Sites, shape: tuple[int, ...]) -> _Pass:
    """The pass in the form that the model's blocks have, or an earlier step failed."""
    passes = []
    for form in _FORMS:
        seen = _Pass()
        try:
            _pass(sites, form, seen, shape[1])
        except Exception as error:
            seen.error = " ".join(f"{type(error).__name__}: {error}".split())
            passes.append(seen)
            continue
        seen.complete = True
        # a tuple taken for a tensor loses its first dimension, a tensor taken for a tuple is none
        if len({got.shape if got is not None else None for _, got in seen.blocks}) <= 1:
            return seen
        passes.append(seen)
    return passes[0]


def _pass(sites: Sites, form: Callable[[Tensor | None], Any], seen: _Pass, tokens: int) -> None:
    assert sites.blocks is not None and sites.trunk is not None and sites.embed is not None

    def block(k: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            got = first_tensor(args, kwargs)
            seen.blocks.append((k, got))
            return form(got)

        return forward

    def norm(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.norm.append((len(seen.blocks), first_tensor(args, kwargs)))

    device = next(sites.embed.parameters()).device
    ids = torch.ones(1, tokens, dtype=torch.long, device=device)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_same_random_state(device))
        for k, module in enumerate(sites.blocks):
            stack.enter_context(routed(module, block(k)))
        if sites.norm is not None:
            stack.callback(sites.norm.register_forward_pre_hook(norm, with_kwargs=True).remove)
        sites.trunk(input_ids=ids, use_cache=False)


@contextmanager
def _mode(body: nn.Module, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in body.modules()]
    body.train(training)
    try:
        yield
    finally:
        for module, own in before:
            module.training = own


@contextmanager
def _same_random_state(device: torch.device) -> Iterator[None]:
    """Dropout of the embeddings draws numbers here that training must not miss."""
    if device.type in ("cpu", "meta"):
        with torch.random.fork_rng([]):
            yield
    else:
        with torch.random.fork_rng([device], device_type=device.type):
            yield
