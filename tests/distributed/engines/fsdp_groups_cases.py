"""Every way that trainers cut a causal language model into FSDP2 groups, and one training step of
it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import nitp_ops
from nitp_ops.attaching import handle_of, tap
from nitp_ops.attaching.batch_streams import token_streams
from nitp_ops.objectives import Counts, ModelInfo, Streams, build

RANKS, VOCABULARY, ROWS, LENGTH = 2, 61, 4, 10
EVERY_READER = (
    "ntp + 0.5*mtp_shared + 0.3*mtp_sequential(depth=2) + 0.7*nextlat + 0.8*nitp(target_layer=1)"
)

Values = dict[str, Tensor]


def tiny_llama(tied: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype).train()  # type: ignore[reportArgumentType]


def rows(ranks: slice = slice(None)) -> Values:
    """Two rows a rank. The last ones have three and seven labels: ranks count differently."""
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[-1, : LENGTH - 3] = labels[-2, : LENGTH - 7] = -100
    return {
        name: x.view(RANKS, -1, LENGTH)[ranks].flatten(0, 1)
        for name, x in (("input_ids", ids), ("labels", labels))
    }


class Grouping(NamedTuple):
    """``groups(model)`` become groups of their own, after the layers and before the root."""

    name: str
    groups: Callable[[Any], Iterable[Any]]
    reshard: bool
    tied: bool = False


GROUPINGS = [
    Grouping("root", lambda m: [], True),
    Grouping("tied: root", lambda m: [], False, tied=True),
    Grouping(
        "norm, embedding, head", lambda m: [m.model.norm, m.model.embed_tokens, m.lm_head], True
    ),
    *(
        grouping
        for reshard in (True, False)
        for grouping in (
            Grouping("head", lambda m: [m.lm_head], reshard),
            Grouping(
                "embedding, [norm, head]",
                lambda m: [m.model.embed_tokens, [m.model.norm, m.lm_head]],
                reshard,
            ),
            Grouping(
                "tied: [embedding, head]",
                lambda m: [[m.model.embed_tokens, m.lm_head]],
                reshard,
                tied=True,
            ),
            Grouping("tied: [norm, embedding, head]", lambda m: [_tail(m)], reshard, tied=True),
        )
    ),
]


def _tail(model: Any) -> list[Any]:
    return [model.model.norm, model.model.embed_tokens, model.lm_head]


def cut(root: nn.Module, model: Any, grouping: Grouping, **options: Any) -> None:
    """`fully_shard` as a trainer does: layers, groups, root."""
    for owner in (*model.model.layers, *grouping.groups(model)):
        fully_shard(owner, reshard_after_forward=grouping.reshard, **options)
    fully_shard(root, **options)


def wrap_layers(model: Any) -> None:
    """Activation checkpointing as Accelerate applies it."""
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer, preserve_rng_state=False)


CHECKPOINTING: dict[str, Callable[[Any], None]] = {
    "none": lambda model: None,
    "transformers": lambda model: model.gradient_checkpointing_enable(),
    "transformers, reentrant": lambda model: model.gradient_checkpointing_enable(
        {"use_reentrant": True}
    ),
    "wrapper": wrap_layers,
}


class Tapped(nn.Module):
    """The model beside an objective that `build` made, in a module of the user's."""

    def __init__(self, model: Any, spec: str) -> None:
        super().__init__()
        self.objective = nitp_ops.attach(model, spec).objective
        model.nitp_handle.detach()
        self.model, self.tap = model, tap(model, self.objective)

    def forward(self, counts: Counts, **batch: Tensor) -> Any:
        with self.tap:
            self.model(
                batch["input_ids"], logits_to_keep=torch.empty(0, dtype=torch.long), use_cache=False
            )
        return self.objective(self.tap.streams(**token_streams(batch)), counts=counts)


def steps(model: nn.Module, loss_of: Callable[[], Tensor], count: int = 2) -> list[Values]:
    """Loss and gradients of steps of plain gradient descent, over all ranks, by the plain model's
    names."""
    found = []
    for _ in range(count):
        loss = loss_of()
        loss.backward()
        total = loss.detach().clone()
        if _sharded(model):
            dist.all_reduce(total, op=dist.ReduceOp.SUM)
            total /= RANKS
        values = {"loss": total}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad
                values[_plain(name)] = (
                    gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
                )
                with torch.no_grad():
                    parameter -= 0.5 * gradient
                parameter.grad = None
        found.append(values)
    return found


def attached(model: Any, batch: Values) -> Callable[[], Tensor]:
    handle = handle_of(model)

    def loss() -> Tensor:
        handle.set_counts(handle.count(batch).all_reduce() if _sharded(model) else None)
        return model(**batch).loss

    return loss


def tapped(model: Tapped, batch: Values) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        return model(
            model.objective.count(Streams(**token_streams(batch))).all_reduce(), **batch
        ).loss

    return loss


def tapped_outside(model: Any, spec: str, batch: Values) -> Callable[[], Tensor]:
    """The objective, which owns no parameter, stands beside a model that is the root of its groups."""
    config = model.config
    info = ModelInfo(
        hidden_size=config.hidden_size,
        vocab_size=VOCABULARY,
        num_layers=config.num_hidden_layers,
        dtype=torch.float64,
    )
    objective = build(spec, model=info)
    taps = tap(model, objective)

    def loss() -> Tensor:
        with taps:
            model(
                batch["input_ids"], logits_to_keep=torch.empty(0, dtype=torch.long), use_cache=False
            )
        streams = taps.streams(**token_streams(batch))
        return objective(streams, counts=objective.count(streams).all_reduce()).loss

    return loss


def same_steps(
    mine: list[Values], expected: list[Values], what: str, tolerance: float = 1e-10
) -> None:
    for index, (found, values) in enumerate(zip(mine, expected, strict=True)):
        assert found.keys() == values.keys(), (
            f"{what}: gradients of {sorted(found.keys() ^ values.keys())}"
        )
        for name, value in values.items():
            error = (found[name] - value).abs().max().item()
            assert error <= tolerance, f"{what}: step {index}, {name}: off by {error:.1e}"


def _sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _plain(name: str) -> str:
    name = name.replace("_checkpoint_wrapped_module.", "")
    return (
        name.removeprefix("model.")
        if name.startswith(("model.model.", "model.lm_head"))
        else _own(name)
    )


def _own(name: str) -> str:
    return f"nitp_{name}" if name.startswith("objective.") else name
