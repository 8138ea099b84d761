"""One whole training step of a Qwen2-0.5B-shaped model: forward, backward, AdamW, at a context of
8192 tokens.

The number by which somebody who pre-trains decides: tokens per second and peak GiB of the model
with its own loss, with "ntp" and with "ntp + nitp" attached. The weights are random (a
configuration of transformers, nothing is downloaded); parameters, gradients and AdamW's state are
in the dtype of the case; the batch is one row of random tokens.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import nitp_ops
from benchmarks.measure.cuda import Instant
from benchmarks.measure.process_memory import resident_bytes
from benchmarks.measure.timing import quartiles

#: Objective -> what it is.
OBJECTIVES = {
    "plain": "the model's own loss: its logits in float32, F.cross_entropy",
    "plain, liger head": "the model with Liger-Kernel's fused linear cross-entropy, and nothing "
    "else of it",
    "ntp": 'nitp_ops.attach(model, "ntp")',
    "ntp + nitp": 'nitp_ops.attach(model, "ntp + 0.8*nitp")',
}
SPECS = {"ntp": "ntp", "ntp + nitp": "ntp + 0.8*nitp"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the model, as Qwen/Qwen2-0.5B publishes them, and of the batch."""

    tokens: int = 8192
    hidden: int = 896
    layers: int = 24
    heads: int = 14
    kv_heads: int = 2
    intermediate: int = 4864
    vocabulary: int = 151936


def build(
    device: torch.device, objective: str, sizes: Sizes, dtype: torch.dtype, checkpointing: bool
) -> Any:
    """(model, handle or None): the same random weights for every objective.

    Raises:
        ImportError: transformers, or Liger-Kernel where it is asked for, is not installed.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=max(32768, sizes.tokens),
        tie_word_embeddings=True,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    with device:
        model = Qwen2ForCausalLM(config)
    model.to(dtype=dtype).train()  # type: ignore[reportArgumentType]
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if objective == "plain, liger head":
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2  # type: ignore[reportMissingImports]

        apply_liger_kernel_to_qwen2(rope=False, rms_norm=False, swiglu=False, model=model)
    spec = SPECS.get(objective)
    return model, None if spec is None else nitp_ops.attach(model, spec)


def measure(
    device: torch.device | str,
    objective: str,
    *,
    dtype: str = "bfloat16",
    gradient_checkpointing: bool = False,
    steps: int = 8,
    warmup: int = 3,
    **sizes: int,
) -> dict[str, Any]:
    """One record: what ran, milliseconds a step, tokens per second, peak GiB, the losses of the
    first step.

    Peak: on a GPU the most that the allocator held in a step after the warm-up, on a CPU the most
        that was resident;
    model, gradients and optimizer are in it. Losses: of the first step, before any weight has
    changed, so that those of "plain" and "ntp" agree; ntp_loss is the NTP part of an objective.

    Raises:
        ValueError: no such objective.
        TypeError: no such size.
        ImportError: see `build`.
    """
    if objective not in OBJECTIVES:
        raise ValueError(
            f"training_step: objective is {objective!r}, expected one of {', '.join(OBJECTIVES)}"
        )
    device, chosen = torch.device(device), Sizes(**sizes)
    model, handle = build(device, objective, chosen, getattr(torch, dtype), gradient_checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(chosen.vocabulary, (1, chosen.tokens), generator=generator).to(device)

    def step() -> torch.Tensor:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    loss = float(step())
    ntp_loss = loss if handle is None else handle.metrics.compute()["loss/ntp"]
    for _ in range(warmup - 1):
        step()
    clock, peak_bytes = meters(device)
    moments = [clock()]
    for _ in range(steps):
        step()
        moments.append(clock())
    seconds = [after - before for before, after in itertools.pairwise(moments)]
    milliseconds = quartiles([1e3 * value for value in seconds])
    return {
        "op": "training_step",
        "objective": objective,
        "what": OBJECTIVES[objective],
        "sizes": dataclasses.asdict(chosen),
        "dtype": dtype,
        "optimizer": "torch.optim.AdamW, fused",
        "gradient_checkpointing": gradient_checkpointing,
        "attention": "sdpa",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "milliseconds": milliseconds,
        "rounds": steps,
        "tokens_per_s": 1e3 * chosen.tokens / milliseconds["median"],
        "peak_gib": peak_bytes() / 2**30,
        "loss": loss,
        "ntp_loss": float(ntp_loss),
    }


def meters(device: torch.device) -> tuple[Callable[[], Any], Callable[[], int]]:
    """(clock, peak bytes since this call) of a device; what nobody holds any more is given back
    first."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return Instant, lambda: torch.cuda.max_memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return time.perf_counter, lambda: resident_bytes("VmHWM")
