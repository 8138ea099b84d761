"""A plain training loop in the manner of nanoGPT, with NITP beside next-token prediction: three
lines more.

    python examples/plain_loop.py [steps]

The model knows nothing of objectives. It trains on the bytes of Python's own standard library.
"""

from __future__ import annotations

import argparse
import inspect
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nitp_ops.attaching import tap
from nitp_ops.objectives import ModelInfo, build

WIDTH, LAYERS, HEADS, CONTEXT, ROWS = 64, 4, 4, 64, 16


class Block(nn.Module):
    """``x <- x + Attention(LayerNorm(x)); x <- x + MLP(LayerNorm(x))``."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            self.attn(self.ln_1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        )
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.proj(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A decoder whose forward gives the logits of the last position, all that sampling needs."""

    def __init__(self) -> None:
        super().__init__()
        layers = {"wte": nn.Embedding(256, WIDTH), "wpe": nn.Embedding(CONTEXT, WIDTH)}
        self.transformer = nn.ModuleDict(layers)
        self.transformer["h"] = nn.ModuleList(Block() for _ in range(LAYERS))
        self.transformer["ln_f"] = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer["wte"](ids) + self.transformer["wpe"](torch.arange(ids.shape[1]))
        for block in self.transformer["h"]:  # type: ignore[union-attr]
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x)[:, [-1]])


def batches(seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and pre-shifted targets [ROWS, CONTEXT] from the sources of the standard library."""
    text = b"".join(inspect.getsource(module).encode() for module in (inspect, random))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    starts = torch.randint(
        len(data) - CONTEXT, (ROWS,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    rows = torch.stack([data[start : start + CONTEXT + 1] for start in starts])
    return rows[:, :-1], rows[:, 1:]


def main(steps: int = 60) -> list[float]:
    """Train; the NTP loss of every step."""
    torch.manual_seed(0)
    model = GPT()
    info = ModelInfo(hidden_size=WIDTH, vocab_size=256, num_layers=LAYERS)
    objective = build("ntp + 0.8*nitp(target_layer=1)", model=info)  # added: what to train
    tapped = tap(model, objective, blocks="transformer.h", norm="transformer.ln_f", head="lm_head")
    optimizer = torch.optim.AdamW([*model.parameters(), *objective.parameters()], lr=3e-3)
    losses = []
    for step in range(steps):
        x, y = batches(step)
        with tapped:  # added: collect the streams of this pass
            model(x)
        # added: in place of F.cross_entropy
        out = objective(tapped.streams(token_ids=x, shift_labels=y))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        numbers = out.metrics.compute()
        losses.append(numbers["ntp/loss"])
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3}  ntp {numbers['ntp/loss']:.3f}  nitp {numbers['nitp/loss']:.3f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="?", type=int, default=60)
    main(parser.parse_args().steps)
