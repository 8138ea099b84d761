"""Compiles libnitp_ops.so (operators, stable ABI) and nitp_ops/_C (pybind11) with ninja; no torch
is needed.

The CUDA kernels are part of it wherever a usable nvcc is found, whether or not a GPU is there
(build_cuda.py). The portable wheel's library is linked for every Linux, and has no module beside it
(portable.py)."""

from __future__ import annotations

import json
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

TOOLS = Path(__file__).parent
CSRC = TOOLS.parent
CUDA = runpy.run_path(str(TOOLS / "build_cuda.py"))
PORTABLE = runpy.run_path(str(TOOLS / "portable.py"))
REVISION = runpy.run_path(str(TOOLS / "revision.py"))
#: Stripped; no library that the command names is left out.
LINK = "-s -Wl,--no-as-needed -Wl,-soname,libnitp_ops.so -Wl,--version-script=exports.txt"
EXPORTS = "{ global: nitp_ops_*; local: *; };\n"
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mprefer-vector-width=512"
#: avx512_bf16 holds the kernels over bfloat16 alone; all others are avx512's there. Those over
#: float64 are avx2's. On x86 the portable kernels are for processors of before 2013: -O2 compiles
#: them in 2/3 of the time.
TARGET_FLAGS = {
    "portable": "-O2",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16",
}
#: Compiled once: what takes tensors, and what chooses the instruction set.
ONCE = (
    "schemas",
    "build_info",
    "cpu/register",
    "cpu/gemm/register",
    "cpu/instruction_set",
    "cpu/prefault",
)
#: The other sources of csrc/cpu, by name: compiled for each instruction set.
KERNELS = {
    Path(source).name: source
    for source in sorted(
        str(path.relative_to(CSRC).with_suffix("")) for path in CSRC.glob("cpu/**/*.cpp")
    )
    if source not in ONCE
}
FLAGS = (
    "-std=c++20 -O3 -fPIC -fopenmp-simd -fno-math-errno -fno-trapping-math -ffp-contract=fast "
    "-fvisibility=hidden -Wall -Wextra -Wno-unused-parameter -DNDEBUG"
)
PROBE = (
    "#include <optional>\n#include <tuple>\nint main() { return [](auto x) { return x; }(0); }\n"
)


class BuildError(RuntimeError):
    """The compiled library cannot be built here; the message says why and what to do."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"nitp_ops: the compiled kernels cannot be built: {reason}. On Linux install a C++20 "
            "compiler (g++ >= 10, or clang >= 14; CXX names another one); or set NITP_OPS_PURE=1 "
            "to install without compiled kernels on purpose."
        )


def find_compiler(portable: str | None = None) -> list[str]:
    """The C++ compiler and its leading arguments, after it has compiled a small program.

    Args:
        portable: the machine that a portable library is for; a foreign one has a cross compiler.

    Raises:
        BuildError: it is absent, or too old, or cannot link what is requested.
    """
    if sys.platform != "linux":
        raise BuildError(f"they are built on Linux, this is {sys.platform}")
    crossed = PORTABLE["cross_compiler"](portable) if portable else None
    requested = "" if crossed else os.environ.get("CXX", "").strip()
    try:
        compiler = crossed or shlex.split(requested) or ["g++" if shutil.which("g++") else "c++"]
    except ValueError as error:
        raise BuildError(f"CXX={requested} is no command ({error})") from error
    name = f"CXX={requested}" if requested else f"the C++ compiler {compiler[0]}"
    if shutil.which(compiler[0]) is None:
        raise BuildError(f"{name} is not on the PATH")
    command = [*compiler, *FLAGS.split(), "-x", "c++", "-fsyntax-only", "-"]
    done = subprocess.run(command, input=PROBE, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{name} does not compile C++20 ({_first_line(done.stderr)})")
    reason = PORTABLE["unusable"](portable, compiler) if portable else None
    if reason:
        raise BuildError(reason)
    return compiler


def build(
    compiler: Sequence[str],
    work: Path,
    package: Path,
    module_name: str | None,
    portable: str | None = None,
) -> None:
    """Writes work/build.ninja, runs it, and puts the library and the module into the folder
    `package`.

    Args:
        module_name: the file name of _C; None leaves it out.
        portable: "x86_64" or "aarch64" for a library that every Linux on such a machine loads; else
            it is for this one.

    Raises:
        BuildError: a compile or a link failed; its own output comes before.
    """
    work.mkdir(parents=True, exist_ok=True)
    package.mkdir(parents=True, exist_ok=True)
    machine = portable or platform.machine()
    link(work / "csrc", CSRC)
    cxx, x86 = shlex.join(compiler), machine == "x86_64"
    flags = f"{FLAGS}{' -DNITP_X86' if x86 else ''}"
    objects = [(source.replace("/", "_"), f"csrc/{source}.cpp", flags) for source in ONCE]
    for target, chosen in TARGET_FLAGS.items() if x86 else (("portable", ""),):
        own = f"{flags} -DNITP_TARGET={target} {chosen}"
        objects += [
            (f"{name}.{target}", f"csrc/{source}.cpp", own) for name, source in KERNELS.items()
        ]
    nvcc = CUDA["find_nvcc"]() if machine == platform.machine() else None
    if nvcc:
        objects.append(("cuda_register", "csrc/cuda/register.cpp", f"{flags} -Icsrc/cuda"))
    write_facts(work / "facts.json", cxx, flags, nvcc)
    library = package / "libnitp_ops.so"
    stub = torch_stub(compiler, work)
    linker, runtimes = PORTABLE["linker"](machine, compiler, work) if portable else (compiler, [])
    (work / "exports.txt").write_text(EXPORTS)
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {escape_value(cxx)}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {escape_value(shlex.join(linker))} -shared $in -o $out $flags",
    ]
    cuda_lines, cuda_objects, cuda_linked = cuda_rules(nvcc)
    lines += [
        *cuda_lines,
        *(module_rules(library, package / module_name, work) if module_name else ()),
    ]
    for name, source, own in sorted(objects, key=lambda each: -length(work / each[1])):
        generated = " | build_info.inc" if name == "build_info" else ""
        lines += [f"build {name}.o: compile {source}{generated}", f"  flags = {own} -I."]
    lines += [
        f"build {escape(library)}: link "
        f"{' '.join([*(f'{name}.o' for name, *_ in objects), *cuda_objects])}"
        # else ninja puts it off until the library is there
        f"{' || module.o' if module_name else ''}",
        f"  flags = {LINK} {' '.join(map(quote, [stub, *runtimes]))} -ldl {cuda_linked}",
    ]
    (work / "build.ninja").write_text("\n".join(lines) + "\n")
    if subprocess.run([ninja(), "-C", str(work)], check=False).returncode:
        raise BuildError("a compile or a link failed, see above")


def link(name: Path, folder: Path) -> None:
    """Compilers see the same names in every build: the same bytes come out, and a cache finds what
    another compiled."""
    if name.is_symlink():
        name.unlink()
    name.symlink_to(folder.resolve(), target_is_directory=True)


def length(source: Path) -> int:
    """ninja begins in the order of its rules: the long compiles first, so that none is left to one
    core at the end."""
    return source.stat().st_size


def module_rules(library: Path, module: Path, work: Path) -> list[str]:
    """nitp_ops._C links against the library beside it."""
    import pybind11

    link(work / "pybind11", Path(pybind11.get_include()))
    python = f"-isystem {quote(sysconfig.get_path('include'))} -isystem pybind11"
    beside = f"-L{quote(library.parent)} -l:{library.name} -Wl,-rpath,'$$ORIGIN'"
    return [
        "build module.o: compile csrc/python_module.cpp",
        f"  flags = {FLAGS} -O0 {python}",
        f"build {escape(module)}: link module.o | {escape(library)}",
        f"  flags = -s {beside}",
    ]


def torch_stub(compiler: Sequence[str], work: Path) -> Path:
    """An empty libtorch_cpu.so to link with: the library then loads torch's by this name.

    The symbols stay undefined until the library is loaded, which is after torch."""
    stub = work / "stub/libtorch_cpu.so"
    stub.parent.mkdir(exist_ok=True)
    command = [*compiler, "-shared", "-nostdlib", "-x", "c++", os.devnull, "-o", str(stub)]
    command += ["-Wl,--no-as-needed", f"-Wl,-soname,{stub.name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(
            f"{shlex.join(compiler)} links no shared library ({_first_line(done.stderr)})"
        )
    return stub


def cuda_rules(nvcc: str | None) -> tuple[list[str], list[str], str]:
    """Lines of build.ninja, objects, and flags of the link; without nvcc only an empty table of
    kernels."""
    kernels = CUDA["KERNELS"] if nvcc else {}
    lines = [
        f"nvcc = {escape_value(quote(nvcc or ''))}",
        "rule nvcc",
        "  command = $nvcc $flags -MD -MF $out.d -c $in -o $out > $out.txt 2>&1 || (cat $out.txt; "
        "exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule facts",
        f"  command = {quote(sys.executable)} csrc/tools/build_cuda.py $out $in",
    ]
    for name, source in sorted(kernels.items(), key=lambda kernel: -length(kernel[1])):
        lines += [f"build {name}.cu.o | {name}.cu.o.txt: nvcc csrc/{source.relative_to(CSRC)}"]
        lines += [f"  flags = {CUDA['flags'](nvcc, name)}"]
    reports = " ".join(f"{name}.cu.o.txt" for name in kernels)
    lines.append(f"build build_info.inc: facts facts.json {reports}")
    linked = f"-L{quote(CUDA['libraries'](nvcc))} -lcudart_static -lrt -lpthread" if nvcc else ""
    return lines, [f"{name}.cu.o" for name in kernels], linked


def write_facts(file: Path, cxx: str, flags: str, nvcc: str | None) -> None:
    """The facts of `nitp_ops.build_info`, without the CUDA kernels' report; not rewritten where
    nothing changed."""
    compiled_by = subprocess.run(
        [*shlex.split(cxx), "--version"], capture_output=True, text=True, check=False
    )
    facts = {
        "cuda": CUDA["version"](nvcc) if nvcc else None,
        "cuda_architectures": list(CUDA["architectures"](nvcc)) if nvcc else [],
        "compiler": _first_line(compiled_by.stdout),
        "flags": flags,
        "commit": REVISION["commit"](),
    }
    text = json.dumps(facts)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


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
    return escape_value(str(path.resolve())).replace(" ", "$ ").replace(":", "$:")


def escape_value(text: str) -> str:
    return text.replace("$", "$$")


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")
