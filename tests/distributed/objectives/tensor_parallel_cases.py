"""What runs on every rank for tests/distributed/objectives/test_tensor_parallel.py: objectives on
models whose head is sharded."""

# Gradients that a backward pass just left, and options in dictionaries, are more than a type
# checker follows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportReturnType=false
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import nitp_ops
from nitp_ops.distributed import VocabularyShards
from nitp_ops.objectives import Streams, build
from tests.distributed.ops.vocab_parallel_problem import on_all_ranks, same
from tests.support.objectives_cases import INFO, Batch, make_batch

SPEC = "ntp + mtp_shared + 0.5*top + mtp_parallel(offsets=[4]) + mtp_sequential(depth=2) + 0.8*nitp"
CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


class Model(nn.Module):
    """An embedding, a trunk of one layer, a head and an objective, always of the same values."""

    def __init__(self, part: Batch, spec: str = SPEC, *, tied: bool = False):
        super().__init__()
        self.trunk = nn.Linear(6, 6, dtype=torch.float64)
        for parameter in self.trunk.parameters():
            parameter.data = torch.linspace(-1, 1, parameter.numel(), dtype=torch.float64).view(
                parameter.shape
            )
        self.embed, self.head = copy.deepcopy(part.embed), copy.deepcopy(part.head)
        if tied:
            self.head.weight = self.embed.weight
        self.objective = build(spec, model=INFO)

    def forward(self, part: Batch, **options: object):
        lower = self.embed(part.ids) + part.hidden.detach()
        states = dict.fromkeys(range(INFO.num_layers), lower)
        streams = part.streams(
            last_hidden=self.trunk(lower), hidden_states=states, head=self.head, embed=self.embed
        )
        return self.objective(streams, **options)


def whole(batch: Batch, **options: object) -> tuple[dict[str, Tensor], Tensor, dict[str, float]]:
    model = Model(batch, **options)  # type: ignore[arg-type]
    out = model(batch)
    out.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found, out.loss.detach(), out.metrics.compute()


def gradients_are(
    model: nn.Module, expected: dict[str, Tensor], *, replicated: bool = True
) -> None:
    for name, gradient in expected.items():
        own = model.get_parameter(name).grad
        assert own is not None, f"{name} has no gradient"
        if isinstance(own, DTensor):
            own = own.full_tensor()
        elif replicated:
            on_all_ranks(own, name)
        same(own, gradient, name, 1e-10)


def sharded(model: nn.Module, mesh, **layouts: object) -> nn.Module:
    return parallelize_module(model, mesh, {"head": ColwiseParallel(**layouts)})  # type: ignore[arg-type]


@case
def every_head_term_through_a_sharded_head():
    batch = make_batch(batch=4)
    expected, loss, metrics = whole(batch)
    for layouts in ({}, {"output_layouts": Replicate()}, {"use_local_output": False}):
        model = sharded(Model(batch), init_device_mesh("cpu", (dist.get_world_size(),)), **layouts)
        before = [dict(model.head._forward_pre_hooks), dict(model.head._forward_hooks)]  # type: ignore[union-attr]
        out = model(batch)
        assert before == [dict(model.head._forward_pre_hooks), dict(model.head._forward_hooks)]  # type: ignore[union-attr]
        on_all_ranks(out.loss.detach(), "loss")
        same(out.loss.detach(), loss, "loss")
        assert out.metrics.compute() == pytest.approx(metrics, nan_ok=True)
        out.loss.backward()
        gradients_are(model, expected)


@case
def a_head_that_is_tied_to_its_embedding():
    batch = make_batch(batch=4, bias=False)
    expected, loss, _ = whole(batch, tied=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = Model(batch, tied=True)
    plan = {"head": ColwiseParallel(), "embed": RowwiseParallel(input_layouts=Replicate())}
    model = parallelize_module(model, mesh, plan)  # type: ignore[arg-type]
    model.embed.weight = model.head.weight  # the styles made two parameters of it
    out = model(batch)
    same(out.loss.detach(), loss, "loss")
    out.loss.backward()
    gradients_are(model, expected)


@case
def data_parallel_times_tensor_parallel():
    """Pairs of ranks share a batch; each pair has its own, and unequal counts."""
    if dist.get_world_size() < 4:
        return
    batch = make_batch(batch=4)
    batch.documents = torch.where(torch.arange(7) < torch.tensor([[4], [7], [1], [0]]), 0, -1)
    expected, _, _ = whole(batch)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    mine = mesh.get_local_rank("dp")
    part = batch.part(slice(2 * mine, 2 * mine + 2))
    for fsdp in (False, True):
        model = sharded(Model(batch), mesh["tp"])
        if fsdp:
            for owner in (model.head, model.embed, *model.objective.terms.values(), model):  # type: ignore[union-attr]
                fully_shard(owner, mesh=mesh["dp"])
        counts = model.objective.count(part.streams()).all_reduce(mesh.get_group("dp"))  # type: ignore[union-attr,operator]
        model(part, counts=counts).loss.backward()
        for gradient in [p.grad for p in model.parameters() if p.grad is not None and not fsdp]:
            own = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            dist.all_reduce(own, group=mesh.get_group("dp"))
            own /= 2
        gradients_are(model, expected, replicated=not fsdp)


@case
def transformers_models_loaded_with_a_tp_plan():
    """What ``from_pretrained`` makes of a model under its tp_plan, tied and not, against the loss
    of one process."""
    import transformers
    from transformers.distributed import DistributedConfig

    info = nitp_ops.objectives.ModelInfo(
        hidden_size=16, vocab_size=31, num_layers=2, dtype=torch.float32
    )
    for tied in (False, True):
        config = transformers.LlamaConfig(
            vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, tie_word_embeddings=tied,
        )  # fmt: skip
        torch.manual_seed(1)
        plain, ids = transformers.LlamaForCausalLM(config), torch.randint(0, 31, (2, 9))
        folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(folder)
        if dist.get_rank() == 0:
            plain.save_pretrained(folder[0])
        dist.barrier()
        sharding = DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size())
        model = transformers.LlamaForCausalLM.from_pretrained(
            folder[0], distributed_config=sharding
        )
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder[0])
        assert isinstance(model.lm_head.weight, DTensor) and model.lm_head.weight.placements == (
            Shard(0),
        )
        expected = plain(ids, labels=ids).loss
        expected.backward()
        out = build("ntp", model=info)(
            Streams(
                token_ids=ids, last_hidden=model.model(ids).last_hidden_state, head=model.lm_head
            )
        )
        on_all_ranks(out.loss.detach(), "loss")
        same(out.loss.detach(), expected.detach(), "loss", 1e-5)
        out.loss.backward()
        for name, parameter in plain.named_parameters():
            own = model.get_parameter(name).grad
            assert own is not None and parameter.grad is not None, name
            same(own.full_tensor() if isinstance(own, DTensor) else own, parameter.grad, name, 1e-5)


@case
def dtensors_that_are_no_vocabulary_shards_are_refused():
    batch = make_batch(batch=2)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    hidden, weight = torch.randn(4, 6), torch.randn(11, 6)
    labels = torch.zeros(4, dtype=torch.int64)
    for placement in (Replicate(), Shard(1)):
        wrong = distribute_tensor(weight, mesh, [placement])
        with pytest.raises(TypeError, match=r"expected Shard[(]0[)] once"):
            nitp_ops.linear_cross_entropy(hidden, wrong, labels, group=VocabularyShards())
    shard = distribute_tensor(weight, mesh, [Shard(0)])
    with pytest.raises(
        TypeError,
        match=r"unembedding is a "
        r"DTensor.*group=nitp_ops.distributed.VocabularyShards",
    ):
        nitp_ops.linear_cross_entropy(hidden, shard, labels)
    for name, given in {"hidden": (hidden, labels), "labels": (hidden, labels)}.items():
        given = [
            distribute_tensor(x, mesh, [Replicate()]) if n == name else x
            for n, x in zip(("hidden", "labels"), given, strict=True)
        ]
        with pytest.raises(TypeError, match=f"{name} is a DTensor"):
            nitp_ops.linear_cross_entropy(given[0], shard, given[1], group=VocabularyShards())
        with pytest.raises(TypeError, match=f"{name} is a DTensor"):
            nitp_ops.linear_cross_entropy(given[0], weight, given[1])
    # FSDP's shard of a head, read outside of its forward, looks like a vocabulary shard
    model = Model(batch, "ntp")
    fully_shard(model, mesh=mesh)
    with pytest.raises(TypeError, match="head's weight is a DTensor"):
        model.objective(batch.streams(head=model.head, last_hidden=batch.hidden.detach()))
    model = sharded(Model(batch, "ntp + nextlat"), mesh)
    with pytest.raises(TypeError, match="head's weight is a DTensor"):
        model(batch)
