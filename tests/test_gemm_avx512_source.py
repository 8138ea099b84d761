"""The products that AVX-512 would run, compiled for any processor: tests/avx512 stands in for the instructions."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SETS = {"avx512": [], "avx512_bf16": ["-D__AVX512BF16__"]}


@pytest.mark.programs
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on the PATH")
@pytest.mark.parametrize("name", SETS)
def test_products_of_avx512_are_those_of_float64_and_touch_nothing_else(name, tmp_path):
    flags = ["-std=c++17", "-O1", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags += [f"-I{HERE / 'avx512'}", "-D__AVX2__", "-D__AVX512F__", f"-DNITP_TARGET={name}", *SETS[name]]
    source, program = HERE / "avx512/products.cpp", tmp_path / "products"
    built = subprocess.run(
        ["g++", *flags, str(source), "-o", str(program)], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
