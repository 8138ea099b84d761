"""For the tests with the package `kernels`: the folder that kernel-builder would make of
build.toml, without it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[3]


def build(repository: Path, *, library: bool = False) -> Path:
    """build/torch-cpu with the Python files (with `library` the compiled kernels too, which the
    builder leaves out)."""
    about = dict(re.findall(r'^(\w+) = "?([\w.-]+)"?$', (ROOT / "build.toml").read_text(), re.M))
    name, variant = about["name"].replace("-", "_"), repository / "build/torch-cpu"
    source = ROOT / "torch-ext" / name
    for file in sorted(source.rglob("*")):
        if file.suffix in (".py", ".pyi") or (library and file.name == "libnitp_ops.so"):
            target = variant / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    metadata = {
        "name": about["name"],
        "id": f"_{name}_cpu_0123abc",
        "version": int(about["version"]),
        "license": about["license"],
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata))
    return repository
