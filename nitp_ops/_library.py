"""libnitp_ops.so: loading the compiled row kernels, and what they say about their build and this CPU.

The facts are C functions of the library, read by ctypes: nothing here depends on the Python that built it.
"""

from __future__ import annotations

import ctypes
import functools
import json
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).parent / "libnitp_ops.so"


def _refuse_a_second_copy() -> None:
    """Two copies in a process, such as an installed one and one that the package `kernels` loads from its folder, would
    overwrite each other's operators: these have one name in a process (docs/decisions/0035)."""
    copies = [module for name, module in sys.modules.items() if name.endswith("._library") and name != __name__]
    for module in copies:  # an attribute of any other module may be a lazy import (transformers has hundreds)
        other = getattr(module, "LIBRARY", None)
        if isinstance(other, Path) and other.name == LIBRARY.name:
            raise ImportError(
                f"nitp_ops is loaded from {other.parent}, expected one copy in a process, got a second at "
                f"{LIBRARY.parent}: use the first, or start a process that loads the second alone"
            )


def _load() -> str | None:
    """Load the library into PyTorch's dispatcher; the reason where that fails."""
    if not LIBRARY.exists():
        return _absent()
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        # torch names the path alone; the loader's own words (wrong architecture, old glibc) are the cause
        return f"{LIBRARY} does not load: {str(error.__cause__ or error).splitlines()[0]}"
    failed = _call("nitp_ops_registration_error")
    return f"{LIBRARY} does not register: {failed} (is another copy of nitp_ops loaded?)" if failed else None


def _absent() -> str:
    """Why there is no library: a source tree that shadows an installed package, or an install without one."""
    here = Path(__file__).parent
    if (here.parent / "csrc").is_dir():
        # a build leaves its metadata in the clone (*.egg-info), and Python started there finds those first
        roots = {Path(str(d.locate_file(""))).resolve() for d in metadata.distributions(name="nitp_ops")}
        roots.discard(here.parent.resolve())
        if not roots:
            return f"this is the source tree at {here.parent}, nothing is installed: run pip install {here.parent}"
        installed = next((root / "nitp_ops" for root in roots if (root / "nitp_ops").is_dir()), None)
        if installed is not None:
            return (
                f"this is the source tree at {here.parent}; the installed package is at {installed}: start Python in "
                "another folder"
            )
    if __package__ != "nitp_ops":
        return f"{here} holds Python only, as the package `kernels` loads it: pip install nitp_ops has compiled kernels"
    return (
        "it was installed without its compiled library (NITP_OPS_PURE=1, or a wheel for any platform): install g++ and "
        "run pip install --force-reinstall --no-cache-dir --no-binary nitp_ops nitp_ops"
    )


def _call(name: str) -> str:
    function = getattr(_functions(), name)
    function.restype = ctypes.c_char_p
    return function().decode()


@functools.cache
def _functions() -> ctypes.CDLL:
    return ctypes.CDLL(str(LIBRARY))


def instruction_set() -> str:
    """The CPU instruction set of row kernels and GEMMs: "avx512_bf16", "avx512", "avx2" or "portable"."""
    return _call("nitp_ops_instruction_set")


def choose_instruction_set(name: str) -> None:
    """Row kernels and GEMMs of a lesser instruction set, for the whole process: to test and to compare them.

    Raises:
        ValueError: not "portable", nor a set that this CPU has.
    """
    function = _functions().nitp_ops_choose_instruction_set
    function.restype = ctypes.c_bool
    if not function(ctypes.c_char_p(name.encode())):
        raise ValueError(f"choose_instruction_set: name is {name!r}, expected 'portable' or one that this CPU has")


def has_gemm() -> bool:
    """Whether GEMMs of float32 and of bfloat16 on CPU are this library's own; False without the library."""
    if load_error is not None:
        return False
    function = _functions().nitp_ops_has_gemm
    function.restype = ctypes.c_bool
    return function()


def cuda_refusal(index: int) -> str | None:
    """Why the CUDA kernels cannot run on device `index` (an old driver, no code for it), asked once; None: they can."""
    return _cuda_refusal(index)


# What torch.compiler.assume_constant_result sets; the function itself would import torch._dynamo.
cuda_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _cuda_refusal(index: int) -> str | None:
    function = _functions().nitp_ops_cuda_refusal
    function.restype = ctypes.c_char_p
    reason: bytes | None = function(ctypes.c_int(index))
    return None if reason is None else f"the compiled kernels cannot run on cuda:{index}: {reason.decode()}"


def build_info() -> dict[str, Any]:
    """What the library was built with: cuda, cuda_architectures, compiler, flags, commit; kernels, the assembler's
    report of every CUDA kernel (registers per thread; bytes of shared memory, stack and spills)."""
    return json.loads(_call("nitp_ops_build_info"))


def users_stacklevel() -> int:
    """The stacklevel at which the caller's warning points at the first line outside of nitp_ops."""
    frame, level = sys._getframe(1).f_back, 2
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] in ("nitp_ops", __name__.partition(".")[0]):
            level += 1
        elif not module.startswith("importlib"):  # the frames of an import, which `warnings` does not count
            break
        frame = frame.f_back
    return level


_refuse_a_second_copy()
#: None where the compiled row kernels are loaded, else why they are not.
load_error: str | None = _load()
if load_error is not None:
    warnings.warn(
        f"nitp_ops: no compiled row kernels, backend='torch' serves CPU tensors, same memory bound but slower: "
        f"{load_error}",
        RuntimeWarning,
        stacklevel=users_stacklevel(),
    )
