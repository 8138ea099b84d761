"""The wheel: built in isolation beside the user's torch, installed into a clean environment, and used."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import nitp_ops

ROOT = Path(__file__).parents[1]
TORCH_SITE = Path(torch.__file__).parents[1]

GRADIENT = """
import torch, nitp_ops
hidden = torch.randn(4, 8, requires_grad=True)
nitp_ops.linear_cross_entropy(hidden, torch.randn(16, 8), torch.arange(4){extra}).backward()
print("objectives", nitp_ops.objectives.__name__, "gradient", bool(hidden.grad.abs().sum() > 0))
"""


def run(*command, cwd, check=True, **extra):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | extra
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def environment(folder: Path, with_torch: bool) -> str:
    """A clean virtual environment; torch comes by path, so that nothing else of this environment does."""
    run(sys.executable, "-m", "venv", str(folder), cwd=folder.parent)
    python = folder / "bin/python"
    if with_torch:
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "torch_by_path.pth").write_text(f"{TORCH_SITE}\n")
    return str(python)


def path_without_nvcc() -> str:
    """The PATH less the folders that hold nvcc: the CUDA kernels take more than the rest of the wheel to compile."""
    folders = [f for f in os.environ["PATH"].split(os.pathsep) if not (Path(f) / "nvcc").exists()]
    path = os.pathsep.join(folders)
    return path if shutil.which("g++", path=path) else os.environ["PATH"]


def build(python: str, source: Path, out: Path) -> tuple[Path, str]:
    command = (python, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(out), str(source))
    done = run(*command, cwd=out.parent, PATH=path_without_nvcc())
    return next(out.glob("*.whl")), done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The files of the repository, without anything built in place."""
    folder = tmp_path_factory.mktemp("source") / "nitp_ops"
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.split()
    for name in listed:
        wanted = "/" not in name or name.split("/")[0] in ("csrc", "nitp_ops", "objectives")
        if wanted and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.mark.programs
@pytest.mark.timeout(900)  # a build: minutes on a busy machine
def test_a_wheel_built_in_isolation_computes_a_gradient_in_a_clean_environment(source, tmp_path):
    wheel, _ = build(sys.executable, source, tmp_path / "dist")
    names = zipfile.ZipFile(wheel).namelist()
    assert "nitp_ops/libnitp_ops.so" in names and "nitp_ops/objectives/__init__.py" in names
    assert not any(name.startswith("objectives/") for name in names)
    python = environment(tmp_path / "clean", with_torch=True)
    run(python, "-m", "pip", "install", "-q", "--no-deps", str(wheel), cwd=tmp_path)
    done = run(python, "-c", GRADIENT.format(extra=""), cwd=tmp_path)
    assert done.stdout.strip() == "objectives nitp_ops.objectives gradient True"
    assert "native     ok" in run(python, "-m", "nitp_ops", "doctor", cwd=tmp_path).stdout


@pytest.mark.programs
@pytest.mark.timeout(900)  # a build: minutes on a busy machine
def test_without_torch_the_wheel_is_pure_python_and_says_so(source, tmp_path):
    python = environment(tmp_path / "bare", with_torch=False)
    wheel, log = build(python, source, tmp_path / "dist")
    assert wheel.name.endswith("py3-none-any.whl")
    assert "PURE-PYTHON" in log and "no torch is installed" in log
    clean = environment(tmp_path / "clean", with_torch=True)
    run(clean, "-m", "pip", "install", "-q", "--no-deps", str(wheel), cwd=tmp_path)
    refused = run(clean, "-c", GRADIENT.format(extra=""), cwd=tmp_path, check=False)
    assert "BackendError: linear_cross_entropy: no backend for cpu tensors. native:" in refused.stderr
    assert "no compiled row kernels" in refused.stderr  # the warning at import
    assert "gradient True" in run(clean, "-c", GRADIENT.format(extra=", backend='reference'"), cwd=tmp_path).stdout
    assert "native     off" in run(clean, "-m", "nitp_ops", "doctor", cwd=tmp_path).stdout


def test_the_bare_name_objectives_is_refused_with_the_right_one():
    done = run(sys.executable, "-c", "import objectives", cwd=ROOT, check=False)
    assert done.returncode == 1 and "nitp_ops.objectives" in done.stderr.strip().splitlines()[-1]


def test_the_package_imports_from_any_directory(tmp_path):
    for folder in (tmp_path, ROOT, ROOT / "tests"):
        code = "import nitp_ops; nitp_ops.objectives; assert nitp_ops.rows.missing is None"
        run(sys.executable, "-c", code, cwd=folder)


def test_the_build_module_reports_the_build():
    from nitp_ops import _C

    assert _C.instruction_set() in ("portable", "avx2", "avx512", "avx512_bf16")
    info = _C.build_info()
    assert info["torch"].startswith("2.") and "TORCH_TARGET_VERSION" in info["flags"]
    kernels = _C.kernels()
    if info["cuda"] is None:
        assert kernels == [] and info["cuda_architectures"] == []
    else:
        assert {k["architecture"] for k in kernels} == set(info["cuda_architectures"])
        assert all(0 < k["registers"] <= 128 and k["spills"] == 0 for k in kernels)


def test_doctor_and_env_answer():
    assert "native     ok" in run(sys.executable, "-m", "nitp_ops", "doctor", cwd=ROOT).stdout
    assert "instruction set" in run(sys.executable, "-m", "nitp_ops", "env", cwd=ROOT).stdout


@pytest.mark.parametrize("factor", [float("nan"), 1.001])
def test_doctor_calls_a_wrong_kernel_broken(monkeypatch, capsys, factor):
    from nitp_ops import __main__ as command

    right = nitp_ops.swiglu
    monkeypatch.setattr(nitp_ops, "swiglu", lambda *a, backend=None: right(*a) * (factor if backend == "native" else 1))
    assert command.doctor() == 1
    assert "native     BROKEN" in capsys.readouterr().out
