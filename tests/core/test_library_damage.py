"""A compiled library that does not load: the loader's reason at the user's line, and every op works
all the same."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import nitp_ops
from nitp_ops.core import library

ROOT = Path(__file__).parents[2]
#: The header of a shared object: its first 18 bytes, the machine, where its sections begin, their
#: size and number.
SHARED_OBJECT = b"\x7fELF\x02\x01\x01" + bytes(9) + (3).to_bytes(2, "little")


def elf(machine: int, sections: int) -> bytes:
    table = (
        sections.to_bytes(8, "little")
        + bytes(10)
        + (64).to_bytes(2, "little")
        + (2).to_bytes(2, "little")
    )
    return SHARED_OBJECT + machine.to_bytes(2, "little") + bytes(20) + table + bytes(2)


HERE, FOREIGN, FOREIGN_NAME = (
    (62, 183, "aarch64") if platform.machine() == "x86_64" else (183, 62, "x86_64")
)
USE = """
import nitp_ops, torch
hidden = torch.randn(4, 8, requires_grad=True)
nitp_ops.linear_cross_entropy(hidden, torch.randn(16, 8), torch.arange(4)).backward()
print("gradient", bool(hidden.grad.abs().sum() > 0))
"""


@pytest.fixture
def copy(tmp_path) -> Path:
    """The package as it is installed, without its library."""
    package = tmp_path / "nitp_ops"
    shutil.copytree(
        ROOT / "nitp_ops", package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    shutil.copytree(
        ROOT / "objectives", package / "objectives", ignore=shutil.ignore_patterns("__pycache__")
    )
    return package


def run(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "always", *arguments]
    return subprocess.run(command, cwd=copy.parent, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "file too short"),
        (b"x" * 4096, "invalid ELF header"),
        (
            elf(FOREIGN, 0) + bytes(128),
            f"it is for {FOREIGN_NAME}, this is {platform.machine()}",
        ),
        (elf(HERE, 4096), "it is cut short, 64 of 4224 bytes"),
    ],
)
def test_the_loaders_reason_is_told_at_the_users_line(copy, content, reason):
    (copy / "libnitp_ops.so").write_bytes(content)
    script = copy.parent / "user.py"
    script.write_text(USE)
    done = run(copy, str(script))
    assert done.returncode == 0 and done.stdout == "gradient True\n", done.stderr
    warned = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    assert len(warned) == 1 and warned[0].startswith(
        f"{script}:2: RuntimeWarning: nitp_ops: no compiled row kernels"
    )
    assert "does not load" in warned[0] and reason in warned[0]
    doctor = run(copy, "-m", "nitp_ops", "doctor")
    assert (
        doctor.returncode == 1
        and "native     BROKEN: " in doctor.stdout
        and "torch      ok" in doctor.stdout
    )


def test_a_library_of_another_version_is_named(copy):
    source = 'extern "C" const char* nitp_ops_build_info() { return "{}"; }'
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(copy / "libnitp_ops.so")]
    subprocess.run(command, input=source, text=True, check=True)
    done = run(copy, "-c", USE)
    assert done.stdout == "gradient True\n", done.stderr
    assert (
        "libnitp_ops.so does not load: it is not of this version of nitp_ops, build it again"
        in done.stderr
    )


def test_without_the_objectives_a_command_says_so_in_one_line(copy, monkeypatch):
    """As in a clone that shadows an installed package: only the installer maps objectives/ into the
    package."""
    shutil.rmtree(copy / "objectives")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(folder for folder in sys.path if "site-packages" in folder)
    )
    python = ("-S", "-W", "ignore")  # without site no editable install maps it either
    for command in (["list"], ["explain", "ntp", "--hidden", "8", "--vocab", "9", "--layers", "2"]):
        done = run(copy, *python, "-m", "nitp_ops", *command)
        assert done.returncode == 2 and done.stderr.startswith(f"nitp_ops {command[0]}: "), (
            done.stderr
        )
        assert len(done.stderr.splitlines()) == 1
    done = run(
        copy,
        *python,
        "-c",
        "import nitp_ops; print(hasattr(nitp_ops, 'objectives')); nitp_ops.attach",
    )
    assert done.stdout == "False\n", done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "AttributeError: module 'nitp_ops' has no attribute 'attach': "
    )


def test_without_a_library_torch_serves_and_doctor_says_that_nothing_runs_compiled(copy):
    assert run(copy, "-c", USE).stdout == "gradient True\n"
    doctor = run(copy, "-m", "nitp_ops", "doctor")
    assert doctor.returncode == 1 and "native     off: it was installed without" in doctor.stdout
    assert "reference  ok" in doctor.stdout


def test_env_and_version_say_which_copy_is_meant(copy):
    assert f"package  {copy}\n" in run(copy, "-m", "nitp_ops", "env").stdout
    done = run(copy, "-m", "nitp_ops", "--version")
    assert done.returncode == 0 and done.stdout == f"nitp_ops {nitp_ops.__version__}\n"


def test_no_lazy_module_of_others_is_imported_to_look_for_a_second_copy(monkeypatch):
    """transformers 5.17 has an alias for each image processor, of which any attribute imports
    torchvision."""
    lazy = types.ModuleType("transformers.models.any.image_processing_any_fast")
    lazy.__dict__["__getattr__"] = lambda name: pytest.fail(f"read {name}")
    monkeypatch.setitem(sys.modules, lazy.__name__, lazy)
    library._refuse_a_second_copy()
    other = types.ModuleType("other.core.library")
    other.__dict__["LIBRARY"] = Path("/elsewhere") / library.LIBRARY.name
    monkeypatch.setitem(sys.modules, other.__name__, other)
    with pytest.raises(ImportError, match="loaded from /elsewhere"):
        library._refuse_a_second_copy()
