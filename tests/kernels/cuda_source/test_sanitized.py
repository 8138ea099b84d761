"""The CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.cuda_source.build_for_cpu import build

pytestmark = pytest.mark.gpu_source

if shutil.which("g++") is None:
    pytest.skip(
        "no g++ on the PATH: the CUDA kernels cannot be compiled for the CPU",
        allow_module_level=True,
    )

EVERY_KERNEL = """
import ctypes, itertools, sys, torch
torch.ops.load_library(sys.argv[1])
kernels, library = torch.ops.nitp_simt, ctypes.CDLL(sys.argv[1])
def device(shared_bytes, cluster, threads):
    library.simt_set(*map(ctypes.c_int64, (2, shared_bytes, cluster, threads)))
blocks = set()
for columns in (1, 9, 33, 1000, 4103):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        work = torch.float64 if dtype == torch.float64 else torch.float32
        def rows():  # ends exactly where its memory ends, starts off any boundary
            return torch.randn(2 * columns + 1).to(dtype)[1:].view(2, columns)
        gate, up, out = rows(), rows(), rows()
        kernels.swiglu_rows(gate, up, out)
        kernels.swiglu_rows_backward_(gate, up, out)
        kernels.accumulate_rows_(torch.randn(2, columns), torch.randn(2, columns).bfloat16())
        kernels.scale_rows_(gate, torch.tensor(0.5, dtype=work))
        for distance in range(4):
            index = torch.tensor([1, 2**40])
            kernels.alignment_rows_(rows(), rows(), index, None, torch.empty(4, 2, dtype=work), None, rows(),
                                    distance, 1e-6, True)
        options = torch.randn(columns, dtype=work)
        cases = (None, 0.0, [0, -5]), (options, 3.0, [columns - 1, columns])
        devices = (227 * 1024, 1, 1024), (8192, 2, 128), (8192, 8, 128)
        for (bias, cap, labels), of_device in itertools.product(cases, devices):
            device(*of_device)
            kernels.cross_entropy_rows_(rows(), torch.tensor([labels]).T.contiguous(), None, bias, None, None,
                                        torch.empty(3 if cap else 2, 2, dtype=work), torch.empty(2, 1, dtype=work),
                                        torch.empty(2, dtype=torch.int64), -100, False, 0.1, 0.1, cap, 1.0, True)
            blocks.add(library.simt_last_cluster())
for rows, targets in ((0, 1), (1, 0), (257, 2), (9001, 1)):
    for dtype in (torch.float32, torch.float64):
        def values(*shape):
            return torch.zeros(shape, dtype=dtype)
        labels, best = torch.randint(-100, 9, (rows, targets)), torch.empty(rows, dtype=torch.int64)
        for weight, of_row, one in ((None, None, None), (values(rows, targets), values(rows), None),
                                    (None, values(1), values(1))):
            scale, stats, totals = values(rows), values(3, rows), torch.empty(5, dtype=torch.int64)
            kernels.prepare_rows_(labels, weight, of_row, one, scale, totals, stats, values(rows, targets), best,
                                  -100, targets != 1, 9, True, True, rows // 2)
            kernels.finish_rows_(stats, scale, values(1).double())
print("done", *sorted(blocks))
"""


def sanitized(library: Path) -> subprocess.CompletedProcess:
    """A process of its own runs every kernel: the sanitizers must be loaded before Python."""
    found = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    options = {
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
    command = [sys.executable, "-c", EVERY_KERNEL, str(library)]
    return subprocess.run(
        command, env=os.environ | options, capture_output=True, text=True, check=False
    )


def test_no_kernel_touches_what_is_not_its_own(tmp_path):
    done = sanitized(build(tmp_path, sanitize=True))
    assert done.returncode == 0 and "done 1 2 4 8" in done.stdout, done.stdout + done.stderr
