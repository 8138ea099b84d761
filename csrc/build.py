"""Compiles libnitp_ops.so (operators, stable ABI) and nitp_ops/_C (pybind11, build information) with ninja.

The CUDA kernels are part of it wherever nvcc is on the PATH, whatever torch is installed (csrc/build_cuda.py)."""

from __future__ import annotations

import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

CSRC = Path(__file__).parent
CUDA = runpy.run_path(str(CSRC / "build_cuda.py"))
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mprefer-vector-width=512"
#: avx512_bf16 holds the kernels over bfloat16 alone; all others are avx512's there.
TARGET_FLAGS = {
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16",
}
KERNELS = ("accumulate", "alignment", "cross_entropy", "cross_entropy_gradient", "gemm", "scale", "swiglu")
# 2.11 is the oldest torch that the library loads into; newer ones keep the same binary interface.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
FLAGS = (
    "-std=c++17 -O3 -fPIC -fopenmp-simd -fno-math-errno -fno-trapping-math -fvisibility=hidden -Wall -Wextra "
    "-Wno-unused-parameter -DNDEBUG"
)


def find_torch() -> Path | None:
    """The torch that this interpreter's own site-packages hold.

    Asked of a fresh isolated interpreter: inside pip's build isolation the running one cannot see it."""
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    answer = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False
    ).stdout.strip()
    return Path(answer) if answer and (Path(answer) / "include").is_dir() else None


def why_not(torch: Path | None, compiler: str) -> str | None:
    """The reason why the library cannot be built here, or None."""
    if torch is None:
        return f"no torch is installed for {sys.executable}"
    if torch_version(torch) < (2, 11):
        return f"torch {'.'.join(map(str, torch_version(torch)))} is older than 2.11"
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) is on the PATH"
    return None


def torch_version(torch: Path) -> tuple[int, int]:
    match = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
    assert match, f"{torch / 'version.py'} states no version"
    return int(match[1]), int(match[2])


def build(torch: Path, compiler: str, work: Path, package: Path, module_name: str) -> None:
    """Writes work/build.ninja, runs it, and puts both shared objects into the folder `package`."""
    import pybind11

    work.mkdir(parents=True, exist_ok=True)
    package.mkdir(parents=True, exist_ok=True)
    x86 = platform.machine() in ("x86_64", "AMD64")
    flags = f"{FLAGS} {STABLE_ABI}{' -DNITP_X86' if x86 else ''}"
    includes = f"-isystem {quote(torch / 'include')}"
    objects = [("instruction_set", CSRC / "cpu/instruction_set.cpp", flags)]
    objects += [
        (name, CSRC / f"{path}.cpp", f"{flags} {includes}")
        for name, path in (
            ("library", "library"),
            ("entry", "cpu/entry"),
            ("gemm_entry", "cpu/gemm_entry"),
            ("populate", "cpu/populate"),
        )
    ]
    for target in TARGET_FLAGS if x86 else ("portable",):
        for kernel in KERNELS:
            objects.append(
                (
                    f"{kernel}.{target}",
                    CSRC / f"cpu/{kernel}.cpp",
                    f"{flags} -DNITP_TARGET={target} {TARGET_FLAGS[target]}",
                )
            )
    nvcc = CUDA["find_nvcc"]()
    if nvcc:
        objects.append(("cuda_entry", CSRC / "cuda/entry.cpp", f"{flags} {includes} -I{quote(CSRC / 'cuda')}"))
    python = f"-isystem {quote(sysconfig.get_path('include'))} -isystem {quote(Path(pybind11.get_include()))}"
    described = build_defines(torch, compiler, flags, nvcc)
    library, module = package / "libnitp_ops.so", package / module_name
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {compiler}",
        # messages of the library name files of the source tree, not of the machine that built it
        f"paths = -ffile-prefix-map={quote(CSRC)}=csrc -ffile-prefix-map={quote(torch)}=torch",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags $paths -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared -s $in -o $out $flags",
    ]
    cuda_lines, cuda_objects, cuda_linked = cuda_rules(nvcc)
    lines += cuda_lines
    for name, source, object_flags in objects:
        lines += [f"build {name}.o: compile {escape(source)}", f"  flags = {object_flags}"]
    lines += [
        f"build module.o: compile {escape(CSRC / 'module.cpp')} | kernels.inc",
        f"  flags = {FLAGS} {python} -I{quote(work)} {described}",
    ]
    linked = (
        f"-Wl,--no-as-needed -L{quote(torch / 'lib')} -ltorch_cpu -lc10 -ldl -Wl,-soname,libnitp_ops.so {cuda_linked}"
    )
    lines += [
        f"build {escape(library)}: link {' '.join([*(f'{name}.o' for name, *_ in objects), *cuda_objects])}",
        f"  flags = {linked}",
    ]
    beside = f"-L{quote(package)} -l:libnitp_ops.so -Wl,-rpath,'$$ORIGIN'"
    lines += [f"build {escape(module)}: link module.o | {escape(library)}", f"  flags = {beside}"]
    (work / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run([ninja(), "-C", str(work)], check=True)


def cuda_rules(nvcc: str | None) -> tuple[list[str], list[str], str]:
    """Lines of build.ninja, objects, and flags of the link; without nvcc only an empty table of kernels."""
    kernels = CUDA["KERNELS"] if nvcc else ()
    lines = [
        f"nvcc = {nvcc}",
        "rule nvcc",
        "  command = $nvcc $flags -MD -MF $out.d -c $in -o $out > $out.txt 2>&1 || (cat $out.txt; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule table",
        f"  command = {quote(sys.executable)} {quote(CSRC / 'build_cuda.py')} table $out $in",
    ]
    for name in kernels:
        lines += [f"build {name}.cu.o | {name}.cu.o.txt: nvcc {escape(CSRC / f'cuda/{name}.cu')}"]
        lines += [f"  flags = {CUDA['flags']()}"]
    lines.append(f"build kernels.inc: table {' '.join(f'{name}.cu.o.txt' for name in kernels)}")
    linked = f"-L{quote(CUDA['libraries'](nvcc))} -lcudart_static -lrt -lpthread" if nvcc else ""
    return lines, [f"{name}.cu.o" for name in kernels], linked


def build_defines(torch: Path, compiler: str, flags: str, nvcc: str | None) -> str:
    version = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text())
    compiled_by = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    git = subprocess.run(
        ["git", "-C", str(CSRC), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    facts = {
        "TORCH": version[1] if version else "unknown",
        "COMPILER": compiled_by,
        "FLAGS": flags,
        "COMMIT": git.stdout.strip() or "unknown",
        "CUDA": CUDA["version"](nvcc) if nvcc else "",
        "CUDA_ARCHITECTURES": " ".join(CUDA["ARCHITECTURES"]) if nvcc else "",
    }
    return " ".join(shlex.quote(f'-DNITP_BUILD_{key}="{value}"') for key, value in facts.items())


def ninja() -> str:
    """The ninja of the build environment: the package's own binary, else the one on the PATH."""
    try:
        import ninja as package
    except ImportError:
        return "ninja"
    return str(Path(package.BIN_DIR) / "ninja")


def quote(path: Path | str) -> str:
    return shlex.quote(str(path)).replace("$", "$$")


def escape(path: Path) -> str:
    return str(path.resolve()).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
