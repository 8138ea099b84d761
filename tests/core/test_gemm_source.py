"""The GEMM compiled by itself, under sanitizers: AVX-512's for any processor, as tests/avx512
stands in for it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import processor

HERE = Path(__file__).parent
STAND_IN = [f"-I{HERE / 'avx512'}", "-D__AVX2__", "-D__AVX512F__"]
SETS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": STAND_IN,
    "avx512_bf16": [*STAND_IN, "-D__AVX512BF16__"],
}


@pytest.mark.programs
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on the PATH")
@pytest.mark.parametrize("name", SETS)
def test_gemms_are_those_of_float64_and_touch_nothing_else(name, tmp_path):
    if name == "avx2" and name not in processor.SETS:
        pytest.skip("the processor has no avx2")
    flags = ["-std=c++20", "-O1", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    source, program = HERE / "avx512/gemm_cases.cpp", tmp_path / "gemm_cases"
    command = ["g++", *flags, *SETS[name], f"-DNITP_TARGET={name}", str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
