"""What ninja is told to build: in which order, so that two cores are busy until the end, and from
the same names."""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path

import pytest

from tests.packaging.package_cases import program

ROOT = Path(__file__).parents[2]


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """build.ninja of a build with CUDA and the module, which no ninja has run."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on the PATH")
    pytest.importorskip("pybind11")
    native = runpy.run_path(str(ROOT / "csrc/tools/build.py"))
    nvcc = str(program(tmp_path, "nvcc", "echo compute_80 compute_90 compute_100 compute_120"))
    monkeypatch.setitem(native["CUDA"], "find_nvcc", lambda: nvcc)
    monkeypatch.setitem(native["CUDA"], "libraries", lambda nvcc: tmp_path)
    monkeypatch.setitem(native["build"].__globals__, "ninja", lambda: "true")
    native["build"](["g++"], tmp_path / "work", tmp_path / "package", "_C.so")
    return (tmp_path / "work/build.ninja").read_text()


def compiled(rules: str, by: str) -> list[Path]:
    return [
        ROOT / source
        for source in re.findall(
            rf"^build \S+\.o(?: \| \S+)?: {by} "
            r"(csrc/\S+)",
            rules,
            re.M,
        )
    ]


@pytest.mark.parametrize("by", ["compile", "nvcc"])
def test_long_sources_are_compiled_first(rules, by):
    """A long compile that came last would keep one core while the other is idle."""
    lengths = [
        source.stat().st_size
        for source in compiled(rules, by)
        if source.name != "python_module.cpp"
    ]
    assert len(lengths) >= 7 and lengths == sorted(lengths, reverse=True)


def test_the_module_is_compiled_before_the_library_is_linked(rules):
    """ninja takes first what stands before most links: of module.o alone it would make the last
    step."""
    assert re.search(r"^build \S+/libnitp_ops\.so: link .* \|\| module\.o$", rules, re.M)
    assert compiled(rules, "compile")[0].name == "python_module.cpp"


def test_the_order_of_the_link_is_that_of_the_names(rules):
    """Not of the lengths: the bytes of the library stay when a comment grows."""
    linked = re.search(r"libnitp_ops\.so: link (.*) \|\|", rules)
    assert linked is not None
    of_cuda = [name for name in linked[1].split() if name.endswith(".cu.o")]
    of_sets = [name for name in linked[1].split() if name.endswith(".avx2.o")]
    assert len(of_cuda) == len(compiled(rules, "nvcc")) and of_cuda == sorted(of_cuda)
    assert len(of_sets) >= 7 and of_sets == sorted(of_sets)
