"""What a part of a bundle (`bundle`) holds, put where it belongs: the library into the package,
wheels into one folder.

A part is a folder of xz-packed wheels or pieces of them (NAME.tar.xz.1-of-2) and of
libnitp_ops.so.xz. The pieces of the parts meet in the folder, which outlives a call; a wheel is
there once all of its pieces are.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import io
import json
import lzma
import re
import shutil
import site
import sys
import tarfile
from contextlib import suppress
from pathlib import Path

MANIFEST = "bundle.json"
LIBRARY = "nitp_ops/libnitp_ops.so"
#: Where wheels are unpacked: ignored by git, so that it is neither committed nor copied.
SITE = "build/peers"
MIB = 2**20


def amount(text: str) -> float:
    """Of seconds or MiB, on the command line.

    Raises:
        argparse.ArgumentTypeError: it is no finite number above 0.
    """
    with suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text!r}")


def checked(part: Path, most_mib: float) -> Path:
    """The part.

    Raises:
        OSError: there is no such folder.
        ValueError: the part is above its limit: nothing of it is used.
    """
    if not (part / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{part} holds no {MANIFEST}: benchmarks/gpu.sh bundle makes such a folder"
        )
    size = sum(path.stat().st_size for path in part.iterdir()) / MIB
    if size > most_mib:
        raise ValueError(
            f"{part} has {size:.1f} MiB, above its limit of {most_mib:g} MiB: nothing of it is used"
        )
    return part


def library(part: Path, root: Path) -> str:
    """Put the library into the package, unless one was built there; what was done.

    Raises:
        OSError: it is absent or damaged; nothing is left of it.
    """
    whole, packed = root / LIBRARY, part / f"{Path(LIBRARY).name}.xz"
    if whole.exists():
        return f"{LIBRARY} was there"
    begun = whole.with_suffix(".part")
    try:
        with lzma.open(packed) as file, begun.open("wb") as there:
            shutil.copyfileobj(file, there)
        begun.replace(whole)
    except (EOFError, lzma.LZMAError) as error:
        raise OSError(f"{packed} is damaged ({error})") from error
    finally:
        begun.unlink(missing_ok=True)
    return f"{LIBRARY} unpacked"


def wheels(part: Path, root: Path) -> str:
    """Unpack what is whole; which wheels are new. One that is damaged loses itself alone, and is
    told in its place.

    Raises:
        OSError: the manifest is damaged, or the disk is full.
    """
    target, found = root / SITE, []
    target.mkdir(parents=True, exist_ok=True)
    try:
        packed = json.loads((part / MANIFEST).read_text())["packed"].items()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise OSError(f"{part / MANIFEST} is damaged ({error})") from error
    for piece in sorted(part.glob("*.tar.xz.*-of-*")):
        shutil.copyfile(piece, target / piece.name)
    for name, digest in packed:
        found += _joined(target, name, digest)
    return ", ".join(found) or "no whole wheel"


def _joined(target: Path, name: str, digest: str) -> list[str]:
    """Unpack one archive if all of its pieces have come; what is said of it."""
    # by their count: those of another bundle may lie there too
    pieces: dict[int, dict[int, Path]] = {}
    for path in target.glob(f"{glob.escape(name)}.*"):
        if numbers := re.fullmatch(r"\.(\d+)-of-(\d+)", path.name.removeprefix(name)):
            pieces.setdefault(int(numbers[2]), {})[int(numbers[1])] = path
    whole = [each for count, each in pieces.items() if len(each) == count]
    for each in whole:
        content = b"".join(each[number].read_bytes() for number in sorted(each))
        if hashlib.sha256(content).hexdigest() == digest:
            # its bytes are those that were packed
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                archive.extractall(target, filter="data")
            for path in (path for each in pieces.values() for path in each.values()):
                path.unlink()
            return [name.partition("-")[0]]
    return [f"{name} (not used: its pieces are damaged or of different bundles)"] if whole else []


def search_path(folder: Path) -> list[str]:
    """The folder, and those that its .pth files name."""
    before = list(sys.path)
    site.addsitedir(str(folder))
    found = [path for path in sys.path if path not in before]
    sys.path[:] = before
    return [str(folder), *(path for path in found if path != str(folder))]
