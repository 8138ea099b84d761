"""A Hugging Face model, an objective attached to it in place, an ordinary training loop, a
checkpoint and an export.

    python examples/attach.py [steps]

A tiny random Llama trains on the bytes of Python's own standard library. Needs what `pip install
transformers` brings.
"""

from __future__ import annotations

import argparse
import inspect
import random
import tempfile

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import nitp_ops

CONTEXT, ROWS, MICROBATCHES = 64, 8, 2


def batch(seed: int) -> dict[str, Tensor]:
    """Rows of bytes from the sources of the standard library, the labels unshifted as Hugging Face
    has them."""
    text = b"".join(inspect.getsource(module).encode() for module in (inspect, random))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    starts = torch.randint(
        len(data) - CONTEXT, (ROWS,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    ids = torch.stack([data[start : start + CONTEXT] for start in starts])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def main(steps: int = 40) -> list[float]:
    """Train; the NTP loss of every step."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        vocab_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    handle = nitp_ops.attach(model, "ntp + schedule(to=0.8, warmup=10)*nitp(target_layer=0.2)")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    handle.check(optimizer)
    model.train()
    losses = []
    for step in range(steps):
        window = [batch(MICROBATCHES * step + index) for index in range(MICROBATCHES)]
        handle.set_step(step)
        # so that microbatches add up exactly
        handle.set_counts(handle.count(window[0]) + handle.count(window[1]))
        metrics = []
        for microbatch in window:
            model(**microbatch).loss.backward()
            metrics.append(handle.metrics)
        optimizer.step()
        optimizer.zero_grad()
        numbers = (metrics[0] + metrics[1]).compute()
        losses.append(numbers["ntp/loss"])
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:3}  ntp {numbers['ntp/loss']:.3f}  nitp {numbers['nitp/loss']:.3f}")
    with tempfile.TemporaryDirectory() as folder:
        handle.save(folder)  # the projector, to go on training
        model.save_pretrained(folder)  # the plain model
        plain = LlamaForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([list(b"    def ")])
    mask = torch.ones_like(prompt)
    written = plain.generate(prompt, attention_mask=mask, max_new_tokens=24, do_sample=False)  # type: ignore[attr-defined]
    print("written by the exported model:", repr(bytes(written[0].tolist())))
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="?", type=int, default=40)
    main(parser.parse_args().steps)
