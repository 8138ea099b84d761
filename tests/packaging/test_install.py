"""Installing from a clone, git and an archive, in whatever order and with whatever tools: compiled,
or an error."""

from __future__ import annotations

import runpy
import shlex
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

import tests.packaging.package_cases as cases
from tests.packaging.package_cases import compiled, environment, install, path_without, program, run

ROOT = Path(__file__).parents[2]
# without a compiler cache every build takes minutes
pytestmark = [pytest.mark.package, pytest.mark.timeout(900)]
WAYS_OUT = ("install a C++20 compiler", "NITP_OPS_PURE=1")


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    return cases.sources(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    """nvcc takes longer than all the rest, and no test here is about its kernels."""
    return path_without(tmp_path_factory.mktemp("path"), "nvcc")


@pytest.fixture(scope="module")
def archive(clone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, clone, cwd=folder)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(archive, path, tmp_path_factory) -> Path:
    """Built from the archive alone."""
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "-w",
        folder,
        archive,
        cwd=folder,
        PATH=path,
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The Python of an environment with torch and the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    python = environment(folder / "venv", "torch")
    install(python, wheel, cwd=folder)
    return python


def test_a_wheel_from_the_archive_holds_the_library_and_computes_a_gradient(
    wheel, installed, clone, tmp_path
):
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{tag}-{tag}-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        (facts,) = (
            files.read(name).decode() for name in names if name.endswith(".dist-info/WHEEL")
        )
        (bill,) = (files.read(name).decode() for name in names if ".dist-info/sboms/" in name)
    assert "Root-Is-Purelib: false" in facts and '"components": []' in bill
    assert {
        "nitp_ops/libnitp_ops.so",
        "nitp_ops/objectives/__init__.py",
        "nitp_ops/py.typed",
    } <= set(names)
    assert all(name.startswith(("nitp_ops/", "nitp_ops-")) for name in names)
    assert compiled(installed, tmp_path)
    assert "native     ok" in run(installed, "-m", "nitp_ops", "doctor", cwd=tmp_path).stdout
    commit = run("git", "rev-parse", "HEAD", cwd=clone).stdout[:12]
    assert f"commit: {commit}" in run(installed, "-m", "nitp_ops", "env", cwd=tmp_path).stdout


def test_the_archive_of_another_clone_has_the_same_bytes(archive, clone, tmp_path):
    shell = 'umask 077 && git clone -q "$1" other && exec "$2" -m build --sdist --outdir . other'
    run("sh", "-c", shell, "sh", clone, sys.executable, cwd=tmp_path)
    (again,) = tmp_path.glob("*.tar.gz")
    assert again.read_bytes() == archive.read_bytes()


def test_a_pure_wheel_is_for_any_machine_and_says_what_it_lacks(clone, path, tmp_path):
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path / "dist", clone)
    run(*command, cwd=tmp_path, PATH=path, NITP_OPS_PURE="1")
    wheel = next((tmp_path / "dist").glob("*.whl"))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    python = environment(tmp_path / "a venv", "torch")
    install(python, wheel, cwd=tmp_path)
    told = run(
        python,
        "-W",
        "always",
        "-c",
        cases.GRADIENT.format(extra=", backend='reference'"),
        cwd=tmp_path,
    )
    assert told.stdout.endswith("gradient True\n")
    assert "it was installed without its compiled library" in told.stderr
    assert "--force-reinstall --no-cache-dir" in told.stderr


def test_pip_before_torch_and_without_git_gives_compiled_kernels(clone, tmp_path):
    """The README's line in a fresh environment; torch comes afterwards."""
    archive = tmp_path / "without_git"
    shutil.copytree(clone, archive, ignore=shutil.ignore_patterns(".git", "build", "*.egg-info"))
    python = environment(tmp_path / "venv")
    install(python, archive, cwd=tmp_path, PATH=path_without(tmp_path, "nvcc", "git"))
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "torch_by_path.pth").write_text(f"{cases.SITE}\n")
    assert compiled(python, tmp_path)
    assert "commit: unknown" in run(python, "-m", "nitp_ops", "env", cwd=tmp_path).stdout


def test_uv_from_another_folder_gives_compiled_kernels_whether_or_not_torch_is_there(
    clone, path, tmp_path
):
    uv = Path(sys.executable).with_name("uv")
    python = environment(tmp_path / "a venv", "torch")
    command = (uv, "pip", "install", "--no-deps", "--no-cache", "--python", python, clone)
    run(*command, cwd=tmp_path, PATH=path, UV_SYSTEM_CERTS="1")
    assert compiled(python, tmp_path)


def test_a_pure_build_that_pip_has_cached_is_replaced_by_the_command_in_the_message(
    clone, path, tmp_path
):
    """pip keeps the wheel of a commit: what was built pure once comes back from its cache."""
    commit = run("git", "rev-parse", "HEAD", cwd=clone).stdout.strip()
    python, what = (
        environment(tmp_path / "a venv", "torch"),
        f"nitp_ops @ git+{clone.as_uri()}@{commit}",
    )
    cache = {"PATH": path, "PIP_CACHE_DIR": str(tmp_path / "cache")}
    install(python, what, cwd=tmp_path, NITP_OPS_PURE="1", **cache)
    install(python, "--force-reinstall", what, cwd=tmp_path, **cache)
    told = run(python, "-W", "always", "-c", "import nitp_ops", cwd=tmp_path).stderr
    (line,) = [line for line in told.splitlines() if "run pip install " in line]
    arguments = shlex.split(line.partition("run pip install ")[2])
    assert "--no-deps" in arguments and arguments[-1] == f"git+{clone.as_uri()}@{commit}"
    install(python, *arguments, cwd=tmp_path, **cache)
    assert compiled(python, tmp_path)


def test_cxx_may_have_arguments(monkeypatch):
    native = runpy.run_path(str(ROOT / "csrc/tools/build.py"))
    monkeypatch.setenv("CXX", "g++ -m64")
    assert native["find_compiler"]() == ["g++", "-m64"]


def test_a_cxx_that_is_blank_is_none_and_one_that_is_no_command_is_an_error(monkeypatch):
    native = runpy.run_path(str(ROOT / "csrc/tools/build.py"))
    monkeypatch.setenv("CXX", " ")
    assert native["find_compiler"]() == ["g++"]
    monkeypatch.setenv("CXX", "g++ '-m64")
    with pytest.raises(
        native["BuildError"],
        match=r"CXX=g\+\+ '-m64 is no command \(No closing "
        r"quotation\)",
    ):
        native["find_compiler"]()


@pytest.mark.parametrize(
    ("name", "script", "reason"),
    [
        ("absent", None, "is not on the PATH"),
        (
            "old",
            "echo 'error: unrecognized option -std=c++20' >&2; exit 1",
            "does not compile C++20 (error: unrec",
        ),
        (
            "apple",
            'case "$*" in *--no-as-needed*) echo "ld: unknown option" >&2; exit 1;; esac; exec '
            'g++ "$@"',
            "links no shared library (ld: unknown option)",
        ),
    ],
)
def test_a_compiler_that_cannot_do_it_is_an_error_with_both_ways_out(
    clone, path, tmp_path, name, script, reason
):
    compiler = program(tmp_path / "tools", name, script) if script else tmp_path / "tools/absent"
    python = environment(tmp_path / "venv")
    done = install(python, clone, cwd=tmp_path, check=False, PATH=path, CXX=str(compiler))
    assert done.returncode == 1
    (line,) = {
        line.strip() for line in done.stderr.splitlines() if "kernels cannot be built" in line
    }
    assert reason in line and str(compiler) in line and all(way in line for way in WAYS_OUT)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            'case "$1" in --list-gpu-arch) echo compute_50; echo compute_75;; esac',
            "knows none of sm_80",
        ),
        ("echo 'nvcc fatal: no license' >&2; exit 1", "knows none of sm_80"),
        (
            'case "$1" in --list-gpu-arch) echo compute_80;; *) echo "fatal error: no cc1plus" '
            ">&2; exit 1;; esac",
            "does not compile a kernel (fatal error: no cc1plus)",
        ),
    ],
)
def test_an_nvcc_that_cannot_do_it_leaves_a_wheel_for_cpus_which_says_so(
    clone, path, tmp_path, script, reason
):
    nvcc = program(tmp_path / "tools", "nvcc", script)
    python = environment(tmp_path / "a venv", "torch")
    done = install(python, "-v", clone, cwd=tmp_path, PATH=f"{nvcc.parent}:{path}")
    assert f"built without CUDA kernels: {nvcc} {reason}" in done.stdout + done.stderr
    assert compiled(python, tmp_path)
    assert "cuda: none" in run(python, "-m", "nitp_ops", "env", cwd=tmp_path).stdout


def test_without_pythons_headers_the_library_comes_without_the_module(clone, path, tmp_path):
    script = (
        "import runpy, sys, sysconfig; found = sysconfig.get_path; sysconfig.get_path = lambda "
        "name, *a, **k: '/absent' if name == 'include' else found(name, *a, **k); sys.argv = "
        f"['setup.py', 'build_ext', '--build-lib', {str(tmp_path / 'lib')!r}]; "
        "runpy.run_path('setup.py')"
    )
    done = run(sys.executable, "-c", script, cwd=clone, PATH=path)
    assert (
        "built without nitp_ops._C, which nothing needs: /absent/Python.h is absent" in done.stderr
    )
    assert [file.name for file in (tmp_path / "lib/nitp_ops").iterdir()] == ["libnitp_ops.so"]


@pytest.mark.parametrize("damage", ["absent", "of another Python"])
def test_nothing_needs_the_python_module(installed, tmp_path, damage):
    (module,) = installed.parents[1].glob("lib/python*/site-packages/nitp_ops/_C.*.so")
    kept = tmp_path / module.name
    shutil.move(module, kept)
    try:
        if damage != "absent":
            module.write_bytes(b"not a shared object")
        assert compiled(installed, tmp_path)
        assert "native     ok" in run(installed, "-m", "nitp_ops", "doctor", cwd=tmp_path).stdout
    finally:
        shutil.move(kept, module)


def test_in_a_clone_whose_package_is_installed_elsewhere_the_message_names_both(installed, clone):
    done = run(installed, "-W", "always", "-m", "nitp_ops", "doctor", cwd=clone, check=False)
    package = next(installed.parents[1].glob("lib/python*/site-packages/nitp_ops"))
    assert (
        f"this is the source tree at {clone}; the installed package is at {package}" in done.stdout
    )


@pytest.mark.parametrize(
    "program",
    ["examples/pretrain", "examples/draft", "experiments/ablations", "experiments/evidence"],
)
def test_a_program_without_its_extra_says_what_to_install(installed, tmp_path, program):
    for folder in ("benchmarks", "examples", "experiments"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("runs", "__pycache__")
        )
    told = run(installed, f"{program}.py", cwd=tmp_path, check=False)
    line = told.stderr.splitlines()[-1]  # torch warns before it, where there is no numpy
    assert (
        "Traceback" not in told.stderr
        and told.returncode == 1
        and line.startswith(f"{Path(program).name}: ")
        and line.endswith('pip install "nitp_ops[examples]"')
    )
