"""The Triton rows compile to machine code, as their launchers call them, on a machine without a
GPU.

A driver that only names a GPU stands in for the real one, and a launch ends with the compiled
kernel: so the types, divisibilities, block sizes and warps are those of a real launch of these
tensors.
"""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import JITFunction  # noqa: E402

from nitp_ops.kernels import triton as rows  # noqa: E402

pytestmark = pytest.mark.gpu_source

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ROWS, WIDTH, VOCABULARY = 4, 4096, 128256


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def compiled(request, monkeypatch, tmp_path):
    """The kernels that launches have compiled so far."""
    kernels, run = [], JITFunction.run
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", request.param, 32),
        get_current_device=lambda: request.param,
        get_current_stream=lambda device: 0,
    )

    def compile_only(self, *arguments, grid, warmup, **meta):
        kernels.append(run(self, *arguments, grid=grid, warmup=True, **meta))

    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", compile_only)
    return kernels


def launch(name: str, dtype: torch.dtype) -> None:
    def matrix(columns=WIDTH, rows=ROWS, of=dtype):
        return torch.empty(rows, columns, dtype=of)

    def values(*shape, of=torch.float32):
        return torch.empty(*shape, dtype=of)

    labels, best = torch.empty(ROWS, 1, dtype=torch.int64), torch.empty(ROWS, dtype=torch.int64)
    logits, scale = matrix(VOCABULARY), values(ROWS)
    match name:
        case "swiglu":
            rows.swiglu_rows(matrix(), matrix(), matrix())
        case "swiglu backward":
            rows.swiglu_rows_backward_(matrix(), matrix(), matrix())
        case "accumulate":
            rows.accumulate_rows_(matrix(of=torch.float32), matrix(of=torch.bfloat16))
        case "scale":
            rows.scale_rows_(matrix(), values(()))
        case "cosine" | "mse" | "smooth_l1" | "kl":
            distance = ("cosine", "mse", "smooth_l1", "kl").index(name)
            given = matrix(), matrix(), best, scale, values(4, ROWS), None, matrix()
            rows.alignment_rows_(*given, distance, 1e-6, True)
        case "cross-entropy":
            outputs = values(2, ROWS), values(ROWS, 1), best
            rows.cross_entropy_rows_(
                logits,
                labels,
                None,
                None,
                None,
                scale,
                *outputs,
                -100,
                False,
                0.0,
                0.0,
                0.0,
                1.0,
                True,
            )
        case "cross-entropy of rows that fit":
            outputs = values(2, ROWS), values(ROWS, 1), best
            rows.cross_entropy_rows_(
                matrix(8000),
                labels,
                None,
                None,
                None,
                scale,
                *outputs,
                -100,
                False,
                0.0,
                0.0,
                0.0,
                1.0,
                True,
            )
        case "cross-entropy with every option" | "every option of rows that fit":
            columns = 8000 if name.endswith("fit") else VOCABULARY
            of_class, weight = values(columns), values(ROWS, 4)
            outputs = values(3, ROWS), values(ROWS, 4), best
            rows.cross_entropy_rows_(
                matrix(columns), labels.expand(ROWS, 4).contiguous(), weight, of_class, of_class,
                scale, *outputs, -100, True, 0.1, 0.1, 30.0, 0.5, True,
            )  # fmt: skip
        case "labels" | "labels of classes":
            of_row, of_target, one = (values(shape, of=dtype) for shape in ((ROWS,), (ROWS, 4), ()))
            left = (
                of_row.clone(),
                values(5, of=torch.int64),
                values(3, ROWS, of=dtype),
                of_target.clone(),
                best,
            )
            given = (
                (of_target, None, None) if name == "labels of classes" else (of_target, of_row, one)
            )
            options = -100, name == "labels", 9, True, True, ROWS
            rows.prepare_rows_(labels.expand(ROWS, 4).contiguous(), *given, *left, *options)
        case "loss":
            rows.finish_rows_(
                values(2, ROWS, of=dtype), values(ROWS, of=dtype), values((), of=torch.float64)
            )


#: Registers a thread: the most that leaves room for a second block of 256 threads on a
#: multiprocessor is 128. Rows that fit take 512 threads, which have 128 each.
MOST = {
    "swiglu": 64,
    "swiglu backward": 64,
    "accumulate": 64,
    "scale": 64,
    "cosine": 96,
    "mse": 96,
    "smooth_l1": 96,
    "kl": 96,
    "cross-entropy": 96,
    "cross-entropy of rows that fit": 128,
    "cross-entropy with every option": 255,
    "every option of rows that fit": 128,
}


def registers(kernel, folder) -> int:
    """Those of a thread, of a kernel that needs no other memory for them."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run(
        [CUOBJDUMP, "-res-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    found, stack, local = (
        int(re.findall(rf"\b{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK", "LOCAL")
    )
    assert (stack, local) == (0, 0), usage
    return found


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_kernel_becomes_machine_code_without_spills(name, dtype, compiled, tmp_path):
    launch(name, dtype)
    (kernel,) = compiled
    assert registers(kernel, tmp_path) <= MOST[name]
    # rows are read and written 16 bytes a thread
    wide = re.findall(r"(?:ld|st)\.global\S*\.v4\.b32", kernel.asm["ptx"])
    assert {access[:2] for access in wide} == {"ld", "st"}


@pytest.mark.parametrize(("name", "count"), [("labels", 2), ("labels of classes", 2), ("loss", 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_so_do_those_before_and_after_the_chunks(name, count, dtype, compiled, tmp_path):
    launch(name, dtype)
    assert len(compiled) == count
    assert all(registers(kernel, tmp_path) <= 128 for kernel in compiled)  # 512 threads
    pattern = r"tt\.addptr %\w+, %\w+ : tensor<\d{3,}x!tt\.ptr<\w+>>?, tensor<\d+x(i\d+)>"
    assert {width for kernel in compiled for width in re.findall(pattern, kernel.asm["ttir"])} == {
        "i64"
    }


def test_a_row_of_logits_that_fits_is_read_once(compiled):
    launch("cross-entropy of rows that fit", torch.bfloat16)
    (kernel,) = compiled
    loads = len(re.findall(r"ld\.global\S*\.v4\.b32", kernel.asm["ptx"]))
    assert (loads, kernel.metadata.num_warps) == (2, 16)  # 2 x 8 numbers of each thread are 8192


@pytest.mark.parametrize(
    "name", ["swiglu", "swiglu backward", "accumulate", "scale", "cosine", "cross-entropy"]
)
def test_the_offset_of_a_row_has_64_bits(name, compiled):
    launch(name, torch.bfloat16)
    offsets = re.findall(r"tt\.addptr %\w+, %\w+ : !tt\.ptr<\w+>, (i\d+)", compiled[0].asm["ttir"])
    assert offsets and set(offsets) == {"i64"}, offsets


def test_float64_compiles_too(compiled):
    gate, up, out = (torch.empty(ROWS, WIDTH, dtype=torch.float64) for _ in range(3))
    rows.swiglu_rows(gate, up, out)
    rows.alignment_rows_(
        gate, up, None, None, torch.empty(4, ROWS).double(), None, out, 0, 1e-6, True
    )
    assert len(compiled) == 2 and all(kernel.asm["cubin"] for kernel in compiled)
