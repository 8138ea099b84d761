"""Mutants: one-line edits of kernels, objectives, the engine and adapters, each of which must turn named tests red.

    python tests/mutants.py [WORD ...]      # all, or those whose file or edit holds one of the words

Every edit is made in a copy of the tree, so nothing here is ever wrong. A formula header is compiled by the tests that
run the CUDA sources on the CPU; for csrc/cpu the copy's library is built anew, without nvcc. The named tests must be
green before and red (exit code 1: failed, not broken) after.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mutants_of_adapters import MUTANTS as OF_ADAPTERS
from mutants_of_cpu import MUTANTS as OF_CPU
from mutants_of_engine import MUTANTS as OF_ENGINE
from mutants_of_objectives import MUTANTS as OF_OBJECTIVES
from mutants_of_objectives import Mutant

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("csrc", "nitp_ops", "objectives", "examples", "benchmarks", "tests", "docs", "pyproject.toml")
#: The CPU's last: whoever comes after an edit of theirs would need another build.
MUTANTS: tuple[Mutant, ...] = (*OF_OBJECTIVES, *OF_ENGINE, *OF_ADAPTERS, *OF_CPU)
BUILD = """
import runpy, sysconfig
from pathlib import Path
native = runpy.run_path(str(Path("csrc/build.py").resolve()))
module = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
native["build"](native["find_torch"](), "g++", Path("native").resolve(), Path("nitp_ops").resolve(), module)
"""


def tests_of(mutant: Mutant) -> list[str]:
    """Files, or single functions of them, that must fail."""
    words = (word.partition("::") for word in mutant.tests.split())
    return [f"tests/test_{name}.py{joint}{function}" for name, joint, function in words]


def mutated(mutant: Mutant, text: str) -> str:
    """The file's text with the edit.

    Raises:
        ValueError: the text does not hold the edit's place once.
    """
    if (found := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.file}: {mutant.old!r} stands there {found} times, expected once")
    return text.replace(mutant.old, mutant.new)


def copied(folder: Path) -> None:
    """The tree, importable in place: the installed mapping of objectives/ becomes a link."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(source, folder / name)
    (folder / "nitp_ops/objectives").symlink_to("../objectives")


def build(folder: Path) -> None:
    """The copy's library from the copy's sources; CUDA kernels take minutes and are not asked for."""
    folders = [f for f in os.environ["PATH"].split(os.pathsep) if not (Path(f) / "nvcc").exists()]
    environment = os.environ | {"PATH": os.pathsep.join(folders)}
    subprocess.run([sys.executable, "-c", BUILD], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def run(folder: Path, tests: list[str]) -> int:
    """Exit code of the tests in the copy, up to the first that fails."""
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode > 1:
        print(done.stdout.decode(errors="replace")[-2000:])
    return done.returncode


def native(mutant: Mutant) -> bool:
    """Whether the edit is in what the library's build reads."""
    return mutant.file.startswith("csrc/cpu/")


def main(words: list[str]) -> int:
    """Try every chosen mutant; 1 where one survives or its tests are broken."""
    chosen = [m for m in MUTANTS if not words or any(word in " ".join(m) for word in words)]
    if not chosen:
        print(f"mutants: no mutant holds {' or '.join(words)}")
        return 2
    survivors = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copied(folder)
        if native(chosen[-1]):
            build(folder)
        for test in dict.fromkeys(test for mutant in chosen for test in tests_of(mutant)):
            if (code := run(folder, [test])) != 0:
                print(f"mutants: {test} ends with exit code {code} without any edit; make test comes first")
                return 1
        for number, mutant in enumerate(chosen, start=1):
            path = folder / mutant.file
            text = path.read_text()
            path.write_text(mutated(mutant, text))
            if native(mutant):
                build(folder)
            code = run(folder, tests_of(mutant))
            path.write_text(text)
            verdict = {0: "SURVIVED", 1: "killed"}.get(code, f"BROKEN (exit code {code})")
            survivors += [mutant] if code != 1 else []
            print(f"{number:>2}/{len(chosen)} {verdict}: {mutant.file}: {mutant.old!r} -> {mutant.new!r}", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
