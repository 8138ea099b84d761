"""The command line, checked before anything runs."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from experiments.console.failure import BadInput

from .data import VOCAB_SIZE
from .model import ModelConfig

# Steps of a run where --steps is not given: alone, and as one of many control arms.
STEPS, CONTROL_STEPS = 600, 200

# Options that change what is computed: a resumed run must have the same.
TRAJECTORY = (
    "dim",
    "layers",
    "heads",
    "kv_heads",
    "context",
    "tied",
    "batch",
    "accumulate",
    "steps",
    "lr",
    "warmup",
    "decay",
    "weight_decay",
    "clip",
    "dtype",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """One field per option; see `--help`."""

    objectives: list[str] | None
    controls: bool
    data: Path | None
    out: Path
    resume: bool
    dim: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    tied: bool
    batch: int
    accumulate: int
    steps: int
    lr: float
    warmup: float
    decay: float
    weight_decay: float
    clip: float
    dtype: str
    device: str
    threads: int | None
    seeds: list[int]
    eval_every: int
    eval_windows: int
    checkpoint_every: int
    keep_heads: bool
    fused_head: bool
    seed: int
    """Of the run at hand: one of `seeds`."""

    @property
    def model(self) -> ModelConfig:
        """The shapes of the decoder."""
        return ModelConfig(
            vocab_size=VOCAB_SIZE,
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            context=self.context,
            tied=self.tied,
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step reads."""
        return self.batch * self.accumulate * self.context

    def of_seed(self, seed: int) -> Options:
        """The same for one of the seeds."""
        return replace(self, seed=seed)

    def trajectory(self) -> dict[str, Any]:
        """What a resumed run must share with the run that it continues."""
        values = asdict(self)
        return {name: values[name] for name in TRAJECTORY}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; see --help")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def whole(least: int, most: int = 2**31) -> Any:
    """The type of a whole number in [least, most]."""

    def whole_number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is too small, expected at least {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{value} is too large, expected at most {most}")
        return value

    return whole_number


def _real(least: float, most: float = math.inf) -> Any:
    def number(text: str) -> float:
        value = float(text)
        if not (math.isfinite(value) and least <= value <= most):
            raise argparse.ArgumentTypeError(f"{text} is no finite number in [{least:g}, {most:g}]")
        return value

    return number


def training_parser(prog: str, description: str, out: str) -> Parser:
    """The options that every command of the examples shares: data, shapes, hyperparameters."""
    parser = Parser(
        prog=prog,
        description=description,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        metavar="FILE|DIR",
        help="text; without it, the sources of Python's library",
    )
    add("--out", type=Path, default=Path(out), metavar="DIR", help="checkpoints, tables, figures")
    add("--dim", type=whole(1), default=128, help="width of the residual stream")
    add("--layers", type=whole(1), default=5, help="transformer blocks")
    add("--heads", type=whole(1), default=4, help="attention heads")
    add("--kv-heads", type=whole(1), help="key and value heads (default: as many as --heads)")
    add("--context", type=whole(2), default=128, help="tokens a window")
    add("--tied", action="store_true", help="one matrix for embedding and unembedding")
    add("--batch", type=whole(1), default=16, help="windows a microbatch")
    add("--accumulate", type=whole(1), default=1, help="microbatches a step")
    add(
        "--steps",
        type=whole(1),
        help=f"optimizer steps of each run (default: {STEPS}; {CONTROL_STEPS} of a control arm)",
    )
    add("--lr", type=_real(0), default=3e-3, help="learning rate of the stable phase")
    add("--warmup", type=_real(0, 1), default=0.05, help="fraction of the steps that warms up")
    add(
        "--decay",
        type=_real(0, 1),
        default=0.2,
        help="fraction of the steps that decays, at the end",
    )
    add("--weight-decay", type=_real(0), default=0.1, help="AdamW, on matrices only")
    add("--clip", type=_real(0), default=1.0, help="largest gradient norm; 0 does not clip")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16 is autocast")
    add(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: CUDA when there is one",
    )
    add("--threads", type=whole(1, 1024), help="CPU threads (default: PyTorch's choice)")
    add(
        "--seed",
        "--seeds",
        dest="seeds",
        nargs="+",
        type=whole(0),
        default=[0],
        help="of weights and data order",
    )
    add("--eval-every", type=whole(1), default=50, help="steps between looks at held-out text")
    add("--eval-windows", type=whole(2), default=128, help="held-out windows looked at")
    add("--checkpoint-every", type=whole(1), default=100, help="steps between checkpoints")
    return parser


def parse(arguments: list[str] | None) -> Options:
    """Options of the command line of `pretrain.py`.

    Raises:
        BadInput: an unknown option, a value out of range, shapes that do not fit, no CUDA device.
    """
    parser = training_parser(
        "pretrain",
        "Train one small byte-level language model per objective and compare them.",
        "runs/pretrain",
    )
    add = parser.add_argument
    add(
        "--objectives",
        nargs="+",
        metavar="EXPRESSION",
        help='a run each (default: "ntp" "ntp + nitp")',
    )
    add("--controls", action="store_true", help="one run for each of the paper's control arms")
    add("--resume", action="store_true", help="continue the runs in --out from their checkpoints")
    add(
        "--keep-heads",
        action="store_true",
        help="export the objective's own weights too, beside the plain model",
    )
    add(
        "--fused-head",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end with the memory and time of the fused head",
    )
    values = vars(parser.parse_args(arguments))
    values["steps"] = values["steps"] or (CONTROL_STEPS if values["controls"] else STEPS)
    return options_of(values)


def options_of(values: dict[str, Any]) -> Options:
    """Parsed values as checked options.

    Raises:
        BadInput: shapes that do not fit, a seed given twice, no CUDA device.
    """
    values["kv_heads"] = values["kv_heads"] or values["heads"]
    if values["device"] == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    if values["device"] == "auto":
        values["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    seeds = values["seeds"]
    if len(set(seeds)) < len(seeds):
        raise BadInput(
            f"--seeds {' '.join(map(str, seeds))}: a seed is given twice, expected distinct seeds"
        )
    options = Options(**values, seed=seeds[0])
    try:
        _ = options.model
    except ValueError as error:
        raise BadInput(str(error)) from error
    return options
