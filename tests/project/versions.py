"""python -m tests.project.versions: one portable wheel under the oldest and the newest torch, in
clean environments.

Downloads both (gigabytes where pip picks CUDA builds). The tests run against the installed package,
from a folder without the sources; what they say goes into docs/versions.json.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.packaging import wheels

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "docs/versions.json"
VERSIONS = ("torch==2.11.*", "torch")
FILES = (
    "core/test_gemm", "kernels/test_instruction_sets", "ops/test_alignment_and_swiglu", "ops/test_bad_input",
    "ops/implicit_token/test_implicit_token_loss", "ops/implicit_token/test_rows",
    "ops/cross_entropy/test_linear_cross_entropy", "ops/cross_entropy/test_inactive_and_absent_rows", "ops/test_op_laws",
    "engine/test_compile", "engine/spec/test_build", "objectives/test_values", "objectives/latent/test_nitp_gradient",
)  # fmt: skip
FACTS = """
import importlib.util, platform, torch, nitp_ops
triton = importlib.util.find_spec("triton") and __import__("triton").__version__
print(platform.python_version(), torch.__version__, triton, nitp_ops.__version__)
"""


def run(*command: str | Path, cwd: Path, check: bool = True) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    if check and done.returncode:
        raise SystemExit(
            f"versions: {' '.join(map(str, command))} failed\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def tried(wheel: Path, torch: str, folder: Path) -> dict[str, object]:
    """What the wheel does under one torch."""
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv/bin/python"
    tools = ("hypothesis", "numpy", "packaging", "pytest", "pytest-timeout", "safetensors")
    run(python, "-m", "pip", "install", "-q", torch, *tools, cwd=folder)
    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel, cwd=folder)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    versions = dict(
        zip(
            ("python", "torch", "triton", "nitp_ops"),
            run(python, "-c", FACTS, cwd=folder).split(),
            strict=True,
        )
    )
    doctor = run(python, "-m", "nitp_ops", "doctor", cwd=folder, check=False).splitlines()
    files = [f"tests/{name}.py" for name in FILES]
    told = run(python, "-m", "pytest", "-p", "no:cacheprovider", *files, cwd=folder, check=False)
    counts = {
        word: int(number)
        for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", told)
    }
    if set(counts) - {"passed", "skipped"}:
        print(told[-5000:])
    return {**versions, "doctor": [re.sub(r", [\d.]+ s$", "", line) for line in doctor], **counts}


def main() -> int:
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        wheel = wheels.build(ROOT, Path(scratch), "wheel", "true")
        for torch in VERSIONS:
            with tempfile.TemporaryDirectory() as folder:
                results.append(tried(wheel, torch, Path(folder)))
            print(json.dumps(results[-1], indent=1), flush=True)
        RESULT.write_text(
            json.dumps({"wheel": wheel.name, "tests": FILES, "under": results}, indent=1) + "\n"
        )
    return int(
        any(
            "passed" not in result or set(result) & {"failed", "error", "errors"}
            for result in results
        )
    )


if __name__ == "__main__":
    sys.exit(main())
