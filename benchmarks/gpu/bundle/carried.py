"""A source tree that was copied to a machine without a network, with its library built elsewhere or
not."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def importable(root: Path) -> Iterator[None]:
    """Inside the context `nitp_ops` is imported from the tree, also by processes that are started.

    objectives/ lies beside nitp_ops/, where only an installation finds it: a link stands in for one
    that takes longer.
    """
    link = root / "nitp_ops/objectives"
    installed = any(name.startswith("__editable___nitp_ops") for name in sys.modules)
    # a call that was killed leaves its link
    needed = not installed and (link.is_symlink() or not link.exists())
    before = os.environ.get("PYTHONPATH")
    if needed:
        link.unlink(missing_ok=True)
        link.symlink_to(Path("..") / "objectives", target_is_directory=True)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [before])])
    try:
        yield
    finally:
        if needed:
            link.unlink(missing_ok=True)
        os.environ.pop("PYTHONPATH", None)
        os.environ.update({} if before is None else {"PYTHONPATH": before})


def built(root: Path, capability: str, seconds: float) -> str | None:
    """Build the library in the tree, CUDA kernels for one architecture only; why that failed, or
    None."""
    architecture = f"sm_{capability.partition('.')[0]}0"
    if architecture not in runpy.run_path(str(root / "csrc/tools/build_cuda.py"))["ARCHITECTURES"]:
        return f"there are no CUDA kernels for compute capability {capability}"
    if shutil.which("nvcc") is None:
        return "there is no nvcc to build it"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"NITP_CUDA_ARCHITECTURES": architecture}
    try:
        done = subprocess.run(
            command,
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"the build took more than {seconds:.0f} s"
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return (
        (lines[-1].strip() if lines else f"exit code {done.returncode}")
        if done.returncode
        else None
    )
