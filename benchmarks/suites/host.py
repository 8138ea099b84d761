"""`python -m benchmarks --case host`: what a call costs the host, at sizes whose arithmetic costs
nothing.

Forward and backward beside the eager formula, one thread; all calls of a round run in turns, a
round's time is that of `CALLS` calls. On a GPU this is the time in which a small step waits for
Python.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import nitp_ops
from benchmarks.measure import timing
from benchmarks.report import environment, storage, tables
from nitp_ops.objectives import ModelInfo, Streams, build

from . import gate

ROWS, WIDTH, VOCABULARY, INNER = 8, 8, 16, 12
INFO = ModelInfo(hidden_size=WIDTH, vocab_size=VOCABULARY, num_layers=4)
ROUNDS, CALLS, WARM = 30, 50, 20
Step = Callable[[], Any]


def steps() -> dict[str, tuple[Step, Step]]:
    """Name -> (ours, eager): forward and backward of the same loss."""
    torch.manual_seed(0)
    hidden = torch.randn(1, ROWS, WIDTH, requires_grad=True)
    target, labels = torch.randn(1, ROWS, WIDTH), torch.randint(VOCABULARY, (1, ROWS))
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    gate_, up, down = (
        torch.randn(shape, requires_grad=True)
        for shape in ((INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER))
    )

    def eager_tokens(shifted: int = 0) -> torch.Tensor:
        logits = head(hidden)[:, : ROWS - shifted].flatten(0, 1)
        return F.cross_entropy(logits, labels[:, shifted:].flatten())

    def eager_latents() -> torch.Tensor:
        predicted = (F.silu(hidden @ gate_.t()) * (hidden @ up.t())) @ down.t()
        return 1 - F.cosine_similarity(predicted[:, :-1], target[:, 1:], dim=-1).mean()

    def streams() -> Streams:
        return Streams(token_ids=labels, last_hidden=hidden, hidden_states={1: target}, head=head)

    ntp, both = (build(spec, model=INFO) for spec in ("ntp", "ntp + 0.8*nitp(target_layer=1)"))

    def tokens() -> torch.Tensor:
        return nitp_ops.linear_cross_entropy(hidden, head.weight, labels)

    def latents() -> torch.Tensor:
        return nitp_ops.implicit_token_loss(hidden, target, gate_, up, down)

    return {
        "linear_cross_entropy": (lambda: tokens().backward(), lambda: eager_tokens().backward()),
        "implicit_token_loss": (lambda: latents().backward(), lambda: eager_latents().backward()),
        'objective "ntp"': (
            lambda: ntp(streams()).loss.backward(),
            lambda: eager_tokens(1).backward(),
        ),
        'objective "ntp + nitp"': (
            lambda: both(streams()).loss.backward(),
            lambda: (eager_tokens(1) + 0.8 * eager_latents()).backward(),
        ),
    }


def attached() -> tuple[Step, Step]:
    """A step of a tiny Llama with "ntp" attached, and of the plain one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    ours, plain = (LlamaForCausalLM(config).train() for _ in range(2))
    nitp_ops.attach(ours, "ntp")
    ids = torch.randint(VOCABULARY, (1, ROWS))

    def step_of(model: Any) -> Step:
        return lambda: model(input_ids=ids, labels=ids).loss.backward()

    return step_of(ours), step_of(plain)


def measured(ours: Step, eager: Step, rounds: int, calls: int) -> dict[str, dict[str, float]]:
    """Microseconds of a call, and the ratio within rounds."""
    times: dict[str, list[float]] = {"ours": [], "eager": []}
    for step in (ours, eager):
        for _ in range(WARM):
            step()
    for _ in range(rounds):
        for name, step in (("ours", ours), ("eager", eager)):
            begin = time.perf_counter()
            for _ in range(calls):
                step()
            times[name].append((time.perf_counter() - begin) / calls * 1e6)
    found = {name: timing.quartiles(each) for name, each in times.items()}
    return found | {"ratio": timing.ratios(times["ours"], times["eager"])}


def table(cases: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [
        [
            name,
            *(f"{rows[each]['median']:.0f}" for each in ("ours", "eager")),
            f"{rows['ratio']['median']:.2f}",
        ]
        for name, rows in cases.items()
    ]
    return tables.markdown(["forward + backward", "ours, us", "eager, us", "ratio"], lines)


def run(options: argparse.Namespace) -> int:
    """Measure, print, write; 1 when the ops' tests are red."""
    if options.csv or options.markdown or options.html:
        print("benchmarks: --case host writes --json and --save", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    info = environment.machine(1)
    print(environment.machine_line(info), flush=True)
    if gate.refused(["linear_cross_entropy", "implicit_token_loss"]):
        return 1
    pairs = steps()
    try:
        pairs['a tiny Llama, "ntp" attached'] = attached()
    except ImportError as error:
        print(f"a tiny Llama is not measured: {error}")
    rounds, calls = (3, 5) if options.quick else (ROUNDS, CALLS)
    cases = {name: measured(*pair, rounds, calls) for name, pair in pairs.items()}
    print(f"\n{table(cases)}")
    document = {"machine": info, "quick": options.quick, "study": "host", "cases": cases}
    for path in (options.json, storage.results_path(info, kind="-host") if options.save else None):
        if path:
            storage.write_json(path, document)
            print(f"written to {path}")
    return 0
