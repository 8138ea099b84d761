"""What of torchtitan an objective can not train: other decoders, and options of the config."""

from __future__ import annotations

from torch import nn
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.deepseek_v3.mtp import MTPDecoder
from torchtitan.trainer import Trainer


def check_decoder(model: nn.Module) -> None:
    """Refuse what has other logits than ``lm_head(norm(h))`` of one pass over the blocks."""
    name = type(model).__name__
    if not isinstance(model, Decoder):
        raise TypeError(f"torchtitan: model is a {name}, expected a Decoder")
    # MTPDecoder's forward is Decoder's where it has no MTP layers
    if type(model).forward not in (Decoder.forward, MTPDecoder.forward):
        raise TypeError(
            f"torchtitan: model is a {name} with a forward of its own, expected that of Decoder"
        )
    depth = len(getattr(model, "mtp_layers", None) or ())
    if depth:
        raise ValueError(
            f"torchtitan: model is a {name} with {depth} MTP layers, expected num_mtp_layers=0: "
            "the objective has such layers of its own, "
            f'"ntp + 0.3*mtp_sequential(depth={depth}, source=last_residual)"'
        )


def check_config(config: Trainer.Config) -> None:
    """
    Raises:
        ValueError: everything in the config that an objective can not run under.
    """
    parallelism, found = config.parallelism, []
    if parallelism.pipeline_parallel_degree > 1:
        found.append(
            f"parallelism.pipeline_parallel_degree is {parallelism.pipeline_parallel_degree}, "
            "expected 1 (the hidden states of a lower layer are on another stage than the loss; "
            "FSDP shards the same parameters)"
        )
    if parallelism.tensor_parallel_degree > 1:
        found.append(
            f"parallelism.tensor_parallel_degree is {parallelism.tensor_parallel_degree}, expected "
            "1 (a rank holds a slice of the vocabulary; FSDP shards the same parameters)"
        )
    if parallelism.context_parallel_degree > 1:
        found.append(
            f"parallelism.context_parallel_degree is {parallelism.context_parallel_degree}, "
            "expected 1 (the next token of a position may be on another rank)"
        )
    if not config.training.disable_cuda_graphs:
        found.append(
            "training.disable_cuda_graphs is False, expected True (a captured step would replay "
            "the counts and the weights of the first one)"
        )
    if parallelism.spmd_backend == "full_dtensor" or config.debug.spmd_typechecking:
        found.append(
            f'parallelism.spmd_backend is "{parallelism.spmd_backend}", debug.spmd_typechecking is '
            f"{config.debug.spmd_typechecking}, expected local tensors and False (the ops take "
            "plain tensors)"
        )
    if config.checkpoint.create_seed_checkpoint:
        found.append(
            "checkpoint.create_seed_checkpoint is True, expected False (make it with "
            "torchtitan's Trainer)"
        )
    if found:
        raise ValueError("; ".join(f"torchtitan: {problem}" for problem in found))
