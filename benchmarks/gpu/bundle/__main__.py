"""`benchmarks/gpu.sh bundle`: peers' wheels and the built library in parts of at most so many MiB.

Run it where there is a network, for a machine that has none: each part is a folder to copy there.
Where one is not enough, what is left of a wheel is in the next, and both must reach the same
machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from .unpack import LIBRARY, MANIFEST, MIB, amount

ROOT = Path(__file__).resolve().parents[3]
#: Packed wheels of earlier bundles; ignored by git.
PACKED = "build/packed"
#: In the order of their worth; what each needs that a machine with torch and Triton lacks stands
#: with it.
PACKAGES = (
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "torch-c-dlpack-ext",
    "apache-tvm-ffi",
    "einops",
    "nvidia-cutlass-dsl",
    "nvidia-cutlass-dsl-libs-base",
    "nvidia-cutlass-dsl-libs-core",
    "nvidia-cutlass-dsl-libs-cu13",
    "trl",
)
#: pip takes no newer system for an older one: each is named.
PLATFORMS = ("any", *(f"manylinux_2_{n}_x86_64" for n in range(39, 16, -1)), "manylinux2014_x86_64")
#: A wheel's own packing is up to twice as large.
XZ = [
    {"id": lzma.FILTER_X86},
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 256 * MIB},
]


class BundleError(OSError):
    """The bundle cannot be made; the message is one line."""


def download(folder: Path, packages: Sequence[str], python: str) -> list[Path]:
    """The wheels of the packages for that Python, in their order.

    Raises:
        BundleError: one has none.
    """
    wheels: list[Path] = []
    for package in packages:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
        ]
        command += [
            "--python-version",
            python,
            "--implementation",
            "cp",
            "-d",
            str(folder),
            package,
        ]
        command += [
            word
            for tag in (f"cp{python.replace('.', '')}", "abi3", "none")
            for word in ("--abi", tag)
        ]
        command += [word for name in PLATFORMS for word in ("--platform", name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = sorted(set(folder.glob("*.whl")) - set(wheels))
        if done.returncode or not found:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["no wheel"]
            raise BundleError(f"{package}: {lines[-1].removeprefix('ERROR: ')}")
        wheels += found
    return wheels


def packed(wheel: Path, folder: Path) -> Path:
    """The wheel's files as folder/NAME.tar.xz, which is kept: the largest takes minutes."""
    target = folder / wheel.with_suffix(".tar.xz").name
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".partial")
    with tempfile.TemporaryDirectory(dir=wheel.parent) as files, zipfile.ZipFile(wheel) as archive:
        archive.extractall(files)
        with (
            lzma.open(unfinished, "wb", filters=XZ) as file,
            tarfile.open(fileobj=file, mode="w|") as tar,
        ):
            tar.add(files, arcname=".")
    return unfinished.rename(target)


def parts(
    library: int, files: Sequence[tuple[str, int]], most: int
) -> list[list[tuple[str, int, int]]]:
    """[(file, first byte, end)] of each part, which has the library too and at most `most` bytes.

    Raises:
        BundleError: the library alone is above the limit.
    """
    room = most - library
    if room <= 0:
        raise BundleError(
            f"the library has {library / MIB:.1f} MiB, the limit of a part is {most / MIB:.1f} MiB"
        )
    filled: list[list[tuple[str, int, int]]] = [[]]
    free = room
    for name, size in files:
        first = 0
        while first < size:
            if not free:
                filled.append([])
                free = room
            end = min(size, first + free)
            filled[-1].append((name, first, end))
            free, first = free - (end - first), end
    return filled


def write(out: Path, library: Path, files: Sequence[Path], most: int) -> list[Path]:
    """The folders out/part-1, out/part-2, ... of these archives."""
    contents = {path.name: path.read_bytes() for path in files}
    small = lzma.compress(library.read_bytes(), filters=XZ)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    manifest = json.dumps({"packed": digests}, indent=1).encode()
    planned = parts(
        len(small) + len(manifest),
        [(name, len(content)) for name, content in contents.items()],
        most,
    )
    holders = {
        name: [n for n, part in enumerate(planned) if any(each[0] == name for each in part)]
        for name in contents
    }
    made = []
    for number, entries in enumerate(planned):
        part = out / f"part-{number + 1}"
        part.mkdir(parents=True)
        (part / f"{library.name}.xz").write_bytes(small)
        (part / MANIFEST).write_bytes(manifest)
        for name, first, end in entries:
            here = f"{holders[name].index(number) + 1}-of-{len(holders[name])}"
            (part / f"{name}.{here}").write_bytes(contents[name][first:end])
        made.append(part)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Download, pack, write the parts, print the size of each."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh bundle", description=__doc__)
    parser.add_argument("--bundle-mib", type=amount, required=True, help="most MiB of a part")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="a folder that does not exist: part-1, ... are put in it",
    )
    parser.add_argument(
        "--python-version", default="3.12", help="of the other machine (default 3.12)"
    )
    parser.add_argument(
        "--package", action="append", help="only this one, as pip names it (repeatable)"
    )
    options = parser.parse_args(arguments)
    try:
        if options.out.exists():
            raise BundleError(f"{options.out} exists")
        if not (ROOT / LIBRARY).exists():
            raise BundleError(f"{LIBRARY} is not built: run pip install -e .")
        with tempfile.TemporaryDirectory() as folder:
            wheels = download(Path(folder), options.package or PACKAGES, options.python_version)
            for part in write(
                options.out,
                ROOT / LIBRARY,
                [packed(wheel, ROOT / PACKED) for wheel in wheels],
                int(options.bundle_mib * MIB),
            ):
                size = sum(path.stat().st_size for path in part.iterdir()) / MIB
                print(
                    f"{part}: {size:.1f} MiB, "
                    f"{', '.join(sorted(path.name for path in part.iterdir()))}"
                )
    except OSError as error:
        print(f"benchmarks/gpu.sh: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
