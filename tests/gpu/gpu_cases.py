"""What the tests on a GPU share: the device, whose row kernels serve it, and one table of calls of
every public op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import util
from typing import Any

import pytest
import torch
from torch import Tensor

import nitp_ops
from nitp_ops.kernels import select

DEVICE = torch.device("cuda")
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False"
    ),
]
BACKENDS = pytest.mark.parametrize("backend", ["native", "triton"])
ROWS, WIDTH, INNER, VOCABULARY = (2, 37), 24, 40, 301

Call = Callable[..., Any]


def served(backend: str) -> str:
    """The backend; the test is skipped where the installation was made without it, never where it
    is broken."""
    if backend == "native" and "cuda" not in select._COMPILED_FOR:
        pytest.skip("nitp_ops was built without nvcc")
    if backend == "triton" and util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return backend


def moved(value: Any) -> Any:
    """The same tensor, as a leaf with the same wish for a gradient, on the GPU; anything else as it
    is."""
    if not isinstance(value, Tensor):
        return value
    there = value.detach().to(DEVICE)
    return there.requires_grad_() if value.requires_grad else there


def normal(
    *shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).to(DEVICE)
    )


def tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """[hidden, unembedding, gate, up, down], all with gradients, of the sizes above."""
    shapes = (*ROWS, WIDTH), (VOCABULARY, WIDTH), (INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)
    made = [
        normal(*s, seed=seed + i, scale=1 if i == 0 else s[-1] ** -0.5)
        for i, s in enumerate(shapes)
    ]
    return [x.to(dtype).requires_grad_() for x in made]


def labels_and_target(seed: int = 0, ignored: float = 0.3) -> tuple[Tensor, Tensor]:
    """Labels of which a share is ignored, and the latent target."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, VOCABULARY, ROWS, generator=generator)
    labels = labels.masked_fill(torch.rand(ROWS, generator=generator) < ignored, -100)
    return labels.to(DEVICE), normal(*ROWS, WIDTH, seed=seed + 9)


def calls(backend: str, labels: Tensor, target: Tensor) -> dict[str, Call]:
    """Name -> loss of `tensors()`; chunks are smaller than the rows, so that every loop turns more
    than once."""
    token = {"chunk_bytes": 30 * VOCABULARY * 4, "backend": backend}
    latent = {"chunk_bytes": 30 * (3 * INNER + 3 * WIDTH) * 4, "backend": backend}
    weights = torch.full((*labels.shape, 2), 0.5, device=labels.device)
    classes = torch.linspace(0.1, 1, VOCABULARY, device=labels.device)
    scale = torch.linspace(0.5, 2, labels.numel(), device=labels.device).view(labels.shape)
    count, tenth = torch.tensor(50.0, device=labels.device), torch.tensor(0.1, device=labels.device)
    rich = {
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
        "softcap": 20.0,
        "logit_scale": 0.9,
        "class_weight": classes,
    }

    def head(x: Sequence[Tensor], chosen: Tensor = labels, **options: Any) -> Any:
        return nitp_ops.linear_cross_entropy(x[0], x[1], chosen, **{**token, **options})

    def several() -> Tensor:  # in the call: a captured one must follow the labels
        return torch.stack([labels, labels.flip(0)], -1)

    def nitp(x: Sequence[Tensor], weights: Sequence[Tensor | None], **options: Any) -> Any:
        return nitp_ops.implicit_token_loss(
            x[0], target.to(x[0].dtype), *weights, **{**latent, **options}
        )

    def shared(*x: Tensor) -> Tensor:
        jobs = [nitp_ops.CrossEntropyTerm(x[0], labels, token_weight=tenth)]
        jobs.append(
            nitp_ops.CrossEntropyTerm(
                x[0] * 2, labels.flip(0), token_weight=scale, label_smoothing=0.1
            )
        )
        return nitp_ops.grouped_linear_cross_entropy(
            jobs, x[1], chunk_bytes=token["chunk_bytes"], backend=backend
        )[0]

    return {
        "cross-entropy": lambda *x: head(x),
        "cross-entropy, none": lambda *x: head(x, reduction="none"),
        "cross-entropy, every option": lambda *x: head(
            x, token_weight=scale, normalizer=count, **rich
        ),
        "cross-entropy, weighted targets": lambda *x: head(
            x, several(), target_weight=weights, z_loss=0.1
        ),
        "cross-entropy, max_rows": lambda *x: head(x, max_rows=70),
        "cross-entropy, statistics": lambda *x: head(x, return_stats="entropy")[0],
        "shared cross-entropy": shared,
        "implicit token loss": lambda *x: nitp(x, x[2:5]),
        "implicit token loss, none": lambda *x: nitp(
            x, x[2:5], reduction="none", valid=labels >= 0
        ),
        "implicit token loss, max_rows": lambda *x: nitp(x, x[2:5], valid=labels >= 0, max_rows=70),
        "implicit token loss, linear": lambda *x: nitp(
            x, (None, None, x[2][:WIDTH]), distance="mse"
        ),
        "implicit token loss, no projector": lambda *x: nitp(x, (None, None, None), shift=2),
        "alignment": lambda *x: nitp_ops.alignment(x[0], target.to(x[0].dtype), backend=backend),
        "swiglu": lambda *x: nitp_ops.swiglu(x[2], x[3], backend=backend),
    }


NAMES = list(calls("native", torch.zeros(ROWS, dtype=torch.int64), torch.zeros(*ROWS, WIDTH)))
EVERY_CALL = pytest.mark.parametrize("name", NAMES)
