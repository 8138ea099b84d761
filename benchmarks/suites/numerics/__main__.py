"""`python -m benchmarks.suites.numerics`: measures the fused losses and the plan, writes their
pages under docs/.

Time against the GEMMs that each must form, memory, the cost of a chunk's size, and the row kernels.
Every number of those pages comes from here; growth, and the error against the number of chunks:
`python -m benchmarks --case scaling`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure.gemm_times import DTYPES, Sizes
from benchmarks.report import environment, storage

from . import latent_loss, objective_plan
from .token_loss import chunk_sizes, parts, reach

FULL: Sizes = {
    "reach": [(4096, 512, 32000), (2048, 1024, 50304), (1024, 896, 151936)],
    "rounds": 5,
    "chunk": (2048, 1024, 50304, (4, 8, 16, 32, 64, 128, 256)),
    "kernel": (2**24, (32000, 50304, 151936)),
    "gemm": (1024, 50304, (128, 256, 512, 1024)),
}
TOY: Sizes = {
    "reach": [(8, 4, 20)],
    "rounds": 1,
    "chunk": (16, 4, 20, (1, 2)),
    "kernel": (200, (20,)),
    "gemm": (8, 40, (4, 8)),
}


def page(sizes: Sizes, threads: int) -> str:
    info = environment.machine(threads)
    row_table, rate_table, roof = parts(sizes, threads)
    excess = {name: roof[name]["kernel"] * roof[name]["rate"] / 6 for name in DTYPES}
    shares = "; ".join(
        f"{name}: {roof[name]['kernel']:.2f} ns and {roof[name]['rate']:.0f} GFLOP/s, so 1 + "
        f"{excess[name]:.1f} / d, {1 + excess[name] / 512:.3f} at d = 512 and "
        f"{1 + excess[name] / 1024:.3f} at d = 1024"
        for name in DTYPES
    )
    at = " x ".join(str(each) for each in sizes["chunk"][:3])
    return f"""# Numbers of linear_cross_entropy

Written by `python -m benchmarks.suites.numerics --only token`; nothing here is typed by hand.
Machine: {environment.machine_line(info)}.

How time and memory grow with N and V, and the error at up to 256 chunks beside PyTorch's own op:
[growth](growth.md).

## Time and memory

Forward and backward against the three GEMMs alone (`h W^T`, `dlogits W`, `dlogits^T h`, outputs that exist
already), each by the faster of torch.mm and, in float32, oneDNN (into new memory on processors without AVX-512).
Where no library has GEMMs of bfloat16, those of float32 stand for them, in eager too. The same with dW into new
memory, as the op must return it; and all by `torch.mm`. Medians of the ratios within
{sizes["rounds"]} interleaved rounds.
malloc "default" gives blocks over 32 MiB back to the system after each call and maps fresh ones, "raised" keeps them.
Extra MiB: the peak of a fresh process's second step beyond the gradients and the float32 accumulator (default malloc);
a bfloat16 gradient is rounded from its accumulator after that peak, so that its bytes have to be added there.

{reach(sizes, threads)}

## Size of a chunk

Time against the default's at N x d x V = {at}, malloc raised: small chunks read and write the weight
gradient too often and starve the GEMMs, large ones gain nothing more.

{chunk_sizes(sizes, threads)}

## Roofline

The row kernel reads the logits once from the last-level cache, keeps their exponentials in the second-level cache and
writes the gradients once; it is bound by arithmetic, not by memory.

{row_table}

The GEMMs by each library and by nitp_ops itself, by rows a chunk at d = {sizes["gemm"][0]}, V = {sizes["gemm"][1]}:

{rate_table}

With R FLOP/s in the GEMMs (the fastest of each size of a chunk above, their median) and k seconds a logit in the row
kernel (the median over V) the op takes at least `1 + k R / (6 d)` times as long as GEMMs at that rate.
{shares}. Above that are the weight gradient's sum over chunks and fresh pages;
below it a ratio to libraries can lie whose GEMMs are slower than those of nitp_ops.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suites.numerics", description=__doc__
    )
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument(
        "--out",
        type=Path,
        default=environment.ROOT / "docs",
        help="folder of the page (default docs/)",
    )
    parser.add_argument("--only", choices=("token", "latent", "plan"), help="one page")
    parser.add_argument("--toy", action="store_true", help="toy sizes, to see that it runs")
    options = parser.parse_args(arguments)
    if not options.out.is_dir():
        print(
            f"benchmarks.suites.numerics: --out is {options.out}, expected an existing folder",
            file=sys.stderr,
        )
        return 2
    if options.only in (None, "token"):
        text = page(TOY if options.toy else FULL, options.threads)
        _written(options.out / "numerics.md", text)
    for name, module in (("implicit", latent_loss), ("plan", objective_plan)):
        if options.only in (None, {"implicit": "latent"}.get(name, name)):
            sizes = module.TOY if options.toy else module.FULL
            _written(options.out / f"{name}-numerics.md", module.page(sizes, options.threads))
    return 0


def _written(path: Path, text: str) -> None:
    storage.write(path, text)
    print(f"written to {path}")


if __name__ == "__main__":
    sys.exit(main())
