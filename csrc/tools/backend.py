"""setuptools' PEP 517 backend with one more setting and reproducible archives.

    python -m build --config-setting portable=true       # or portable=x86_64, portable=aarch64

builds py3-none-manylinux_2_28_*: a library for any Linux with glibc >= 2.28, under any Python
(portable.py)."""

from __future__ import annotations

import gzip
import io
import os
import platform
import runpy
import tarfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

HERE = Path(__file__).parent
REVISION = runpy.run_path(str(HERE / "revision.py"))
ZIG = "ziglang==0.17.1"
Settings = dict[str, Any] | None


def portable(settings: Settings) -> str | None:
    """The machine that a portable wheel is requested for, or None.

    Raises:
        SystemExit: the setting names none.
    """
    requested = (settings or {}).get("portable", "false")
    choices = {"false": None, "true": platform.machine(), "x86_64": "x86_64", "aarch64": "aarch64"}
    if requested not in choices:
        raise SystemExit(f"nitp_ops: portable={requested}, expected one of {', '.join(choices)}")
    return choices[requested]


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    required = build_meta.get_requires_for_build_wheel(_others(config_settings))
    return [*required, ZIG] if portable(config_settings) else required


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    machine, settings = portable(config_settings), _others(config_settings)
    if machine:
        settings["--build-option"] = [f"--portable={machine}"]
    reproducibly()
    return build_meta.build_wheel(wheel_directory, settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    reproducibly()
    name = build_meta.build_sdist(sdist_directory, _others(config_settings))
    repack(Path(sdist_directory) / name)
    return name


def reproducibly() -> None:
    """The same sources give the same bytes: archives hold the commit's time and plain permissions."""
    os.umask(0o022)
    seconds = REVISION["seconds"]()
    if seconds:
        os.environ.setdefault("SOURCE_DATE_EPOCH", seconds)


def repack(archive: Path) -> None:
    """The same files in order of name, without owners and times of this machine."""
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))
    packed = io.BytesIO()
    with (
        tarfile.open(archive) as old,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mtime = seconds
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    with (
        archive.open("wb") as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=seconds) as compressed,
    ):
        compressed.write(packed.getvalue())


def _others(settings: Settings) -> dict[str, Any]:
    return {key: value for key, value in (settings or {}).items() if key != "portable"}
