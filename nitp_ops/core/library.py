"""libnitp_ops.so: loading the compiled row kernels, and what they say about their build and this
CPU.

The facts are C functions of the library, read by ctypes: nothing here depends on the Python that
built it.
"""

from __future__ import annotations

import ctypes
import functools
import json
import platform
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

_PACKAGE = Path(__file__).parents[1]
LIBRARY = _PACKAGE / "libnitp_ops.so"
#: ELF's numbers of the machines that wheels are for.
_MACHINES = {62: "x86_64", 183: "aarch64"}


def _refuse_a_second_copy() -> None:
    """Two copies in a process, such as an installed one and one that the package `kernels` loads
    from its folder, would overwrite each other's operators: these have one name in a process
    (docs/decisions/0035)."""
    copies = [
        module
        for name, module in sys.modules.items()
        if name.endswith(".core.library") and name != __name__
    ]
    # an attribute of any other module may be a lazy import (transformers has hundreds)
    for module in copies:
        other = getattr(module, "LIBRARY", None)
        if isinstance(other, Path) and other.name == LIBRARY.name:
            raise ImportError(
                f"nitp_ops is loaded from {other.parent}, expected one copy in a process, got a "
                f"second at {LIBRARY.parent}: use the first, or start a process that loads the "
                "second alone"
            )


def _load() -> str | None:
    """Load the library into PyTorch's dispatcher; the reason where that fails."""
    if not (LIBRARY.exists() or LIBRARY.is_symlink()):
        return _absent()
    damage = _damage(LIBRARY)
    if damage is not None:
        return f"{LIBRARY} does not load: it {damage}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        # torch names the path alone; the loader's own words (wrong architecture, old glibc) are the
        # cause
        return f"{LIBRARY} does not load: {str(error.__cause__ or error).splitlines()[0]}"
    if not hasattr(_functions(), "nitp_ops_registration_error"):
        return f"{LIBRARY} does not load: it is not of this version of nitp_ops, build it again"
    failed = _call("nitp_ops_registration_error")
    if not failed:
        return None
    return f"{LIBRARY} does not register: {failed} (is another copy of nitp_ops loaded?)"


def _damage(library: Path) -> str | None:
    """A fault that the ELF header shows and the loader does not: it crashes on a file that is cut
    short, and calls one for another machine absent. None: the loader reports the fault itself."""
    if not library.is_file():
        return None
    with library.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return None
    machine = _MACHINES.get(int.from_bytes(header[18:20], "little"), "another machine")
    if platform.machine() in _MACHINES.values() and machine != platform.machine():
        return f"is for {machine}, this is {platform.machine()}"
    sections = int.from_bytes(header[40:48], "little")
    size = int.from_bytes(header[58:60], "little")
    count = int.from_bytes(header[60:62], "little")
    expected, found = sections + size * count, library.stat().st_size
    return f"is cut short, {found} of {expected} bytes" if found < expected else None


def source_tree() -> str | None:
    """Says that this is a clone, shadowing an installed package or not installed; or None."""
    root = _PACKAGE.parent
    if not (root / "csrc").is_dir():
        return None
    # a build leaves its metadata in the clone (*.egg-info), and Python started there finds those
    # first
    distributions = metadata.distributions(name="nitp_ops")
    roots = {Path(str(each.locate_file(""))).resolve() for each in distributions}
    roots.discard(root.resolve())
    if not roots:
        return f"this is the source tree at {root}, nothing is installed: run pip install {root}"
    installed = next((other / "nitp_ops" for other in roots if (other / "nitp_ops").is_dir()), None)
    if installed is None:
        return None
    shadowed = f"this is the source tree at {root}; the installed package is at {installed}"
    return f"{shadowed}: start Python in another folder"


def _absent() -> str:
    """Why there is no library."""
    tree = source_tree()
    if tree is not None:
        return tree
    if __package__ != "nitp_ops.core":
        return (
            f"{_PACKAGE} holds Python only, as the package `kernels` loads it: pip install "
            "nitp_ops has compiled kernels"
        )
    return (
        "it was installed without its compiled library (NITP_OPS_PURE=1, or a wheel for any "
        "platform): install g++ and run pip install --force-reinstall --no-cache-dir --no-deps "
        f"{_source()}"
    )


def _source() -> str:
    """What pip built this installation from (PEP 610), as its argument."""
    try:
        found = metadata.distribution("nitp_ops")
    except metadata.PackageNotFoundError:  # a copy of the folder
        return "CLONE, a clone of the sources"
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    # pip keeps a space of a folder as it is, and takes none
    url = quote(origin.get("url", ""), safe=":/@+%")
    vcs = origin.get("vcs_info")
    editable = origin.get("dir_info", {}).get("editable")
    if vcs:
        return f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    if url.endswith(".whl"):
        return "CLONE, a clone of the sources"
    if not url:
        return f"--no-binary nitp_ops nitp_ops=={found.version}"
    return f"-e {url}" if editable else url


def _call(name: str) -> str:
    function = getattr(_functions(), name)
    function.restype = ctypes.c_char_p
    return function().decode()


@functools.cache
def _functions() -> ctypes.CDLL:
    return ctypes.CDLL(str(LIBRARY))


def instruction_set() -> str:
    """The CPU instruction set of row kernels and GEMMs: "avx512_bf16", "avx512", "avx2" or
    "portable"."""
    return _call("nitp_ops_instruction_set")


def choose_instruction_set(name: str) -> None:
    """Row kernels and GEMMs of a lesser instruction set, for the whole process: to test and to
    compare them.

    Raises:
        ValueError: not "portable", nor a set that this CPU has.
    """
    function = _functions().nitp_ops_choose_instruction_set
    function.restype = ctypes.c_bool
    if not function(ctypes.c_char_p(name.encode())):
        raise ValueError(
            f"choose_instruction_set: name is {name!r}, expected 'portable' or one that this CPU "
            "has"
        )
    _has_gemm.cache_clear()


def has_gemm() -> bool:
    """Whether GEMMs of float32 and of bfloat16 on CPU are this library's own; False without the
    library."""
    return _has_gemm()


@functools.cache
def _has_gemm() -> bool:
    """Of the current instruction set."""
    if load_error is not None:
        return False
    function = _functions().nitp_ops_has_gemm
    function.restype = ctypes.c_bool
    return function()


# what torch.compiler.assume_constant_result sets; the function itself would import torch._dynamo
has_gemm._dynamo_marked_constant = True  # type: ignore[attr-defined]


def cuda_refusal(index: int) -> str | None:
    """Why the CUDA kernels cannot run on device `index` (an old driver, no code for it), cached;
    None: they can."""
    return _cuda_refusal(index)


# What torch.compiler.assume_constant_result sets; the function itself would import torch._dynamo.
cuda_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _cuda_refusal(index: int) -> str | None:
    function = _functions().nitp_ops_cuda_refusal
    function.restype = ctypes.c_char_p
    reason: bytes | None = function(ctypes.c_int(index))
    if reason is None:
        return None
    return f"the compiled kernels cannot run on cuda:{index}: {reason.decode()}"


def build_info() -> dict[str, Any]:
    """How the library was built: cuda, cuda_architectures, compiler, flags, commit; kernels,
    the assembler's report of every CUDA kernel (registers per thread; bytes of shared memory, stack
    and spills)."""
    return json.loads(_call("nitp_ops_build_info"))


def users_stacklevel() -> int:
    """The stacklevel at which the caller's warning points at the first line outside of nitp_ops."""
    frame, level = sys._getframe(1).f_back, 2
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] in ("nitp_ops", __name__.partition(".")[0]):
            level += 1
        # the frames of an import, which `warnings` does not count
        elif not module.startswith("importlib"):
            break
        frame = frame.f_back
    return level


_refuse_a_second_copy()
#: None where the compiled row kernels are loaded, else why they are not.
load_error: str | None = _load()
if load_error is not None:
    warnings.warn(
        "nitp_ops: no compiled row kernels, backend='torch' serves CPU tensors, same memory "
        f"bound but slower: {load_error}",
        RuntimeWarning,
        stacklevel=users_stacklevel(),
    )
