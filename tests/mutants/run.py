"""Mutants: one-line edits of kernels, objectives, the engine and adapters, each of which must turn named tests red.

    python -m tests.mutants.run [PART | WORD ...]

A part is adapters, cpu, engine, kernels or objectives; any other word chooses the mutants whose file, edit or tests hold it.
Every edit is made in a copy of the tree, so nothing here is ever wrong. A formula header is compiled by the tests that
run the CUDA sources on the CPU; for csrc/cpu the copy's library is built anew, without nvcc. A mutant is killed by a
test that fails with the edit and passes without it. Exit code 1: one survived, or its tests could not tell.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.mutants.of_adapters import MUTANTS as OF_ADAPTERS
from tests.mutants.of_cpu import MUTANTS as OF_CPU
from tests.mutants.of_engine import MUTANTS as OF_ENGINE
from tests.mutants.of_kernels import MUTANTS as OF_KERNELS
from tests.mutants.of_objectives import MUTANTS as OF_OBJECTIVES
from tests.mutants.table import Mutant

ROOT = Path(__file__).resolve().parents[2]
COPIED = (
    "csrc",
    "nitp_ops",
    "objectives",
    "examples",
    "experiments",
    "benchmarks",
    "tests",
    "docs",
    "pyproject.toml",
)
PARTS = {
    "kernels": OF_KERNELS,
    "objectives": OF_OBJECTIVES,
    "engine": OF_ENGINE,
    "adapters": OF_ADAPTERS,
    "cpu": OF_CPU,
}
MUTANTS: tuple[Mutant, ...] = tuple(mutant for part in PARTS.values() for mutant in part)
#: Seconds for the tests of one mutant: pytest's own limit does not end a kernel that loops for ever.
PATIENCE = 900
BUILD = """
import runpy, sysconfig
from pathlib import Path
native = runpy.run_path(str(Path("csrc/tools/build.py").resolve()))
module = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
of_module = native["build"].__globals__
of_module["FLAGS"] = of_module["FLAGS"].replace("-O3", "-O1")  # half the time to compile; -O0 would not sum in lanes
native["build"](native["find_compiler"](), Path("native").resolve(), Path("nitp_ops").resolve(), module)
"""


def tests_of(mutant: Mutant) -> list[str]:
    """Files, or single functions of them, that must fail."""
    words = (word.partition("::") for word in mutant.tests.split())
    paths = ((Path("tests", name), joint + function) for name, joint, function in words)
    return [f"{path.parent}/test_{path.name}.py{function}" for path, function in paths]


def mutated(mutant: Mutant, text: str) -> str:
    """The file's text with the edit.

    Raises:
        ValueError: the text does not hold the edit's place once.
    """
    if (found := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.file}: {mutant.old!r} stands there {found} times, expected once")
    return text.replace(mutant.old, mutant.new)


def choose(words: list[str]) -> list[Mutant]:
    """The mutants of the parts among the words, and those that hold one of the other words; all without words."""

    def wanted(part: str, mutant: Mutant) -> bool:
        return not words or any(
            word == part if word in PARTS else word in " ".join(mutant) for word in words
        )

    return [mutant for part, mutants in PARTS.items() for mutant in mutants if wanted(part, mutant)]


class Copy:
    """A copy of the tree in a folder of its own, importable in place."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(
                    source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results")
                )
            else:
                shutil.copy(source, folder / name)
        (folder / "nitp_ops/objectives").symlink_to("../objectives")  # as the installed mapping
        (folder / "tmp").mkdir()
        self._green: set[str] = set()

    @contextmanager
    def edited(self, mutant: Mutant) -> Iterator[None]:
        """The copy with the edit, and with the library that it makes; as it was afterwards."""
        native, kept = self.folder / "native", self.folder / "kept"
        builds = mutant.file.startswith("csrc/cpu/")
        if builds:
            if not native.exists():
                self._build()
            # what the edit does not touch is not compiled again
            shutil.copytree(native, kept / "native", symlinks=True)
            shutil.copytree(self.folder / "nitp_ops", kept / "nitp_ops", symlinks=True)
        path = self.folder / mutant.file
        text, times = path.read_text(), path.stat()
        path.write_text(mutated(mutant, text))
        try:
            if builds:
                self._build()
            yield
        finally:
            path.write_text(text)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            if builds:
                for name in ("native", "nitp_ops"):
                    shutil.rmtree(self.folder / name)
                    (kept / name).rename(self.folder / name)

    def red(self, tests: list[str]) -> str | None:
        """The first test that fails, None where all pass.

        Raises:
            RuntimeError: the tests cannot be run.
        """
        with suppress(FileNotFoundError):
            shutil.rmtree(self.folder / ".pytest_cache")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", *tests]
        environment = os.environ | {
            "TMPDIR": str(self.folder / "tmp"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        with subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired as error:
                raise RuntimeError(f"the tests take more than {PATIENCE} s") from error
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(
                        process.pid, signal.SIGKILL
                    )  # ranks and workers that a test left running
        if process.returncode == 0:
            return None
        failed = self.folder / ".pytest_cache/v/cache/lastfailed"
        if process.returncode != 1 or not failed.exists():
            raise RuntimeError(f"pytest ended with {process.returncode}:\n{output[-2000:]}")
        return next(iter(json.loads(failed.read_text())))

    def green(self, test: str) -> bool:
        """Whether the test passes in the copy without an edit; asked once."""
        if test not in self._green and self.red([test]) is None:
            self._green.add(test)
        return test in self._green

    def _build(self) -> None:
        """The library from the copy's sources; CUDA kernels take minutes and are not asked for."""
        folders = [
            f for f in os.environ["PATH"].split(os.pathsep) if not (Path(f) / "nvcc").exists()
        ]
        environment = os.environ | {"PATH": os.pathsep.join(folders)}
        command = [sys.executable, "-c", BUILD]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(
                f"the library cannot be built:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )


def verdict(copy: Copy, mutant: Mutant) -> tuple[str, str]:
    """One of killed, SURVIVED and BROKEN, and by which test or why."""
    try:
        with copy.edited(mutant):
            test = copy.red(tests_of(mutant))
        if test is None:
            return "SURVIVED", mutant.tests
        return (
            ("killed", test)
            if copy.green(test)
            else ("BROKEN", f"{test} fails without the edit as well")
        )
    except RuntimeError as error:
        return "BROKEN", str(error)


def main(words: list[str]) -> int:
    """Try every chosen mutant; 1 where one survives or its tests are broken."""
    if not (chosen := choose(words)):
        print(f"mutants: no mutant holds {' or '.join(words)}")
        return 2
    begin, counted, left = time.monotonic(), Counter(), []
    with tempfile.TemporaryDirectory() as name:
        copy = Copy(Path(name))
        for number, mutant in enumerate(chosen, start=1):
            started = time.monotonic()
            word, told = verdict(copy, mutant)
            seconds = time.monotonic() - started
            line = f"{word}: {mutant.file}: {mutant.old!r} -> {mutant.new!r}"
            print(f"{number}/{len(chosen)} {line} ({seconds:.0f} s)\n    {told}", flush=True)
            counted[word] += 1
            left += [line] if word != "killed" else []
    print(*left, sep="\n", end="\n" if left else "")
    print(
        f"{counted['killed']} of {len(chosen)} mutants killed in {time.monotonic() - begin:.0f} s"
    )
    return 1 if left else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the copy goes then too
    parser = argparse.ArgumentParser(
        description="One-line edits, each of which must turn named tests red."
    )
    parser.add_argument(
        "words", nargs="*", metavar="PART | WORD", help=f"{', '.join(PARTS)}, or a text of a mutant"
    )
    sys.exit(main(parser.parse_args().words))
