"""The loss as a layer of the package `kernels`: transformers' use_kernels, two copies in one
process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import nitp_ops
from tests.support.trainer_cases import padded, ragged_rows, tiny_llama
from tests.trainers.cases import kernel_folder

pytestmark = pytest.mark.trainers
HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]


def python(*arguments: str) -> Any:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_build_toml_is_one_that_the_package_parses():
    from kernels._rust import Backend, Build

    assert {Backend.CPU, Backend.CUDA} <= set(Build.open(ROOT).general.backends)


def test_use_kernels_takes_the_loss_from_a_folder(tmp_path):
    done = python("use_kernels.py", str(kernel_folder.build(tmp_path)))
    assert done.returncode == 0 and done.stdout == "taken\n", done.stderr[-3000:]
    assert "holds Python only, as the package `kernels` loads it" in done.stderr


ORDERS = {
    "installed first": """
import nitp_ops as first
def second(): get_local_kernel(Path(sys.argv[1]))
""",
    "folder first": """
first = get_local_kernel(Path(sys.argv[1]))
def second(): import nitp_ops
""",
}
TWO_COPIES = """
import sys, torch
from pathlib import Path
from kernels import get_local_kernel
{order}
for _ in range(2):
    try: second()
    except ImportError as error: print(error)
logits = torch.zeros(2, 3, requires_grad=True)
first.cross_entropy(logits, torch.tensor([0, 1])).backward()
print(first.kernels.select.load_error, logits.grad.abs().sum().item())
"""


@pytest.mark.parametrize("order", ORDERS)
def test_a_second_copy_in_a_process_is_an_import_error_with_both_paths(order, tmp_path):
    folder = kernel_folder.build(tmp_path, library=True) / "build/torch-cpu"
    done = python("-c", TWO_COPIES.format(order=ORDERS[order]), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    paths = Path(nitp_ops.__file__).parent, folder
    first, second = map(str, paths if order == "installed first" else reversed(paths))
    expected = f"nitp_ops is loaded from {first}, expected one copy in a process, got a second at {second}:"
    *refusals, works = done.stdout.splitlines()
    assert len(refusals) == 2 and all(line.startswith(expected) for line in refusals), done.stdout
    assert re.fullmatch(r"None 1\.33\d+", works)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [None, 17, torch.tensor([23])])
def test_the_layer_alone_is_the_loss_of_transformers(dtype, count):
    from transformers.loss.loss_utils import ForCausalLMLoss

    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 48, generator=draw).to(dtype).requires_grad_()
    labels = torch.randint(0, 48, (2, 5), generator=draw)
    labels[0, :3], ours = -100, nitp_ops.layers.ForCausalLMLoss()
    shifted = {"labels": None, "shift_labels": labels.clamp(min=7), "ignore_index": 7, "extra": 1}
    for given in ({"labels": labels}, shifted):
        found, expected = (
            loss(logits=logits, vocab_size=48, num_items_in_batch=count, **given)  # type: ignore[reportArgumentType]
            for loss in (ours, ForCausalLMLoss)
        )
        assert found.dtype == expected.dtype and found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        pair = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (found, expected))
        torch.testing.assert_close(*pair, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-8)


def test_an_installed_layer_needs_no_kernels():
    model, batch = tiny_llama(torch.float32), padded(ragged_rows())
    expected = model(**batch).loss
    model.loss_function = nitp_ops.layers.ForCausalLMLoss().forward
    loss = model(**batch).loss
    assert "CrossEntropyFunction" in type(loss.grad_fn).__name__
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
