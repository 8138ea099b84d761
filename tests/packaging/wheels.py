"""python -m tests.packaging.wheels FOLDER: the archive and the wheels of a release, each
checked before anybody installs it.

* nitp_ops-*.tar.gz, and from it py3-none-manylinux_2_28_x86_64, with CUDA kernels where nvcc >=
  12.8 is on the PATH;
* the same for aarch64, cross-compiled; its row kernels run under qemu against the formulas in
  float64;
* both built a second time from the archive: the bytes must be the same.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.packaging import emulated_wheel, wheel_facts

ROOT = Path(__file__).parents[2]


def build(source: Path, folder: Path, kind: str, machine: str | None = None) -> Path:
    """One archive or portable wheel, with the tools of this environment."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable,
            "-m",
            "build",
            f"--{kind}",
            "--no-isolation",
            "--outdir",
            scratch,
            str(source),
        ]
        command += ["--config-setting", f"portable={machine}"] if machine else []
        done = subprocess.run(
            command,
            cwd=scratch,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{done.stdout}\nwheels: no {kind} from {source}")
        (made,) = Path(scratch).iterdir()
        return Path(shutil.copy(made, folder))


def unpacked(archive: Path, folder: Path) -> Path:
    subprocess.run(["tar", "-xzf", str(archive), "-C", str(folder)], check=True)
    return next(folder.iterdir())


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def portable(archive: Path, out: Path, machine: str) -> list[str]:
    """Build the wheel of one machine twice from the archive; its faults."""
    wheels = []
    for folder in (out, Path(tempfile.mkdtemp())):
        with tempfile.TemporaryDirectory() as scratch:
            wheels.append(build(unpacked(archive, Path(scratch)), folder, "wheel", machine))
    facts = wheel_facts.read(wheels[0])
    glibc = ".".join(map(str, facts.policy))
    print(f"{wheels[0]}: {facts.size / wheel_facts.MB:.2f} MB, {facts.kind}, needs glibc {glibc}")
    print(f"  sha256 {digest(wheels[0])}")
    faults = wheel_facts.faults(facts)
    if digest(wheels[0]) != digest(wheels[1]):
        faults.append(f"a second build has other bytes ({wheels[1]})")
    return [f"{wheels[0].name}: {fault}" for fault in faults]


def main(folder: str) -> int:
    out = Path(folder).resolve()
    archive = build(ROOT, out, "sdist")
    print(
        f"{archive}: {archive.stat().st_size / wheel_facts.MB:.2f} MB\n  sha256 {digest(archive)}"
    )
    faults = portable(archive, out, "x86_64")
    if emulated_wheel.MISSING:
        print(
            f"aarch64: skipped, no {' and no '.join(emulated_wheel.MISSING)} "
            "(g++-aarch64-linux-gnu, qemu-user-static)"
        )
    else:
        faults += portable(archive, out, "aarch64")
        with tempfile.TemporaryDirectory() as scratch:
            errors = emulated_wheel.check(next(out.glob("*_aarch64.whl")), Path(scratch))
        for kernel, error in errors.items():
            print(f"  {kernel}: {error:.2f} of the error that rounding explains")
            faults += [f"aarch64: {kernel} is wrong"] if not error <= 1 else []
    print("\n".join(faults) or "wheels: all checks hold")
    return int(bool(faults))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
