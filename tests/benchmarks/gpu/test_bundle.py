"""`benchmarks/gpu.sh bundle`: peers and the library in parts of a limited size, and what `short`
makes of them."""

import lzma
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu.bundle import __main__ as bundle
from benchmarks.gpu.bundle import carried, unpack
from benchmarks.gpu.short import __main__ as short

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(bundle, "XZ", [{"id": lzma.FILTER_LZMA2, "preset": 0}])


@pytest.fixture
def made(tmp_path, fast):
    """A library and two archives of wheels: `small`, and `large`, of which one part has no room for
    the whole."""
    library = tmp_path / "libnitp_ops.so"
    library.write_bytes(b"library" * 100)
    wheels = []
    for name, content in (
        ("small", b"one = 1\n"),
        ("large", b"data = " + repr(os.urandom(5000)).encode() + b"\n"),
    ):
        wheel = tmp_path / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{name}/packages/{name}_inside.py", content)
            archive.writestr(f"{name}.pth", f"{name}/packages\n")
        wheels.append(bundle.packed(wheel, tmp_path))
    return library, wheels


@pytest.mark.parametrize("most", [4000, 100_000])
def test_the_parts_hold_everything_within_their_limit(tmp_path, made, most):
    library, archives = made
    parts = bundle.write(tmp_path / "out", library, archives, most)
    assert (len(parts) > 1) is (most == 4000)
    assert all(sum(path.stat().st_size for path in part.iterdir()) <= most for part in parts)
    root = tmp_path / "machine"
    (root / "nitp_ops").mkdir(parents=True)
    for number, part in enumerate(parts, 1):
        assert unpack.checked(part, most / unpack.MIB) == part
        assert ("unpacked" in unpack.library(part, root)) is (number == 1)
        said = unpack.wheels(part, root)
        assert ("large" in said) is (number == len(parts))
    assert (root / unpack.LIBRARY).read_bytes() == library.read_bytes()
    folders = unpack.search_path(root / unpack.SITE)
    code = "import small_inside, large_inside; print(small_inside.one, len(large_inside.data))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "1 5000\n", done.stderr
    assert not list((root / unpack.SITE).glob("*.xz*"))
    unpack.wheels(parts[0], root)  # of a later call on the same machine
    assert unpack.search_path(root / unpack.SITE) == folders


@pytest.mark.parametrize(
    "damage", [lambda packed: packed[: len(packed) // 2], lambda packed: b"x" + packed[1:]]
)
def test_of_a_damaged_library_nothing_is_left(tmp_path, made, damage):
    library, archives = made
    part, *_ = bundle.write(tmp_path / "out", library, archives, 100_000)
    packed = part / "libnitp_ops.so.xz"
    packed.write_bytes(damage(packed.read_bytes()))
    (tmp_path / "nitp_ops").mkdir()
    with pytest.raises(OSError, match="is damaged"):
        unpack.library(part, tmp_path)
    assert not any((tmp_path / "nitp_ops").iterdir())


def test_a_part_above_its_limit_or_damaged_is_refused(tmp_path, made):
    library, archives = made
    first, *_ = bundle.write(tmp_path / "out", library, archives, 4000)
    with pytest.raises(ValueError, match=r"above its limit of 0\.001 MiB"):
        unpack.checked(first, 0.001)
    (first / unpack.MANIFEST).write_text('{"packed": ')
    with pytest.raises(OSError, match=r"bundle\.json is damaged"):
        unpack.wheels(first, tmp_path)
    with pytest.raises(bundle.BundleError, match=r"the limit of a part is 0\.0 MiB"):
        bundle.write(tmp_path / "none", library, archives, 10)


def test_a_damaged_wheel_loses_itself_alone_until_a_good_piece_comes(tmp_path, made):
    library, archives = made
    # the large one first
    (part,) = bundle.write(tmp_path / "out", library, archives[::-1], 100_000)
    target = tmp_path / unpack.SITE
    target.mkdir(parents=True)
    (target / f"{archives[1].name}.1-of-2").write_bytes(b"of an earlier bundle")
    (part / f"{archives[1].name}.x-of-y").write_bytes(b"no piece")
    (piece,) = part.glob("large*.1-of-1")
    good = piece.read_bytes()
    piece.write_bytes(b"x" * len(good))
    said = unpack.wheels(part, tmp_path)
    assert (
        said
        == f"{archives[1].name} (not used: its pieces are damaged or of different bundles), small"
    )
    assert (target / "small").is_dir() and not (target / "large").exists()
    piece.write_bytes(good)
    assert unpack.wheels(part, tmp_path) == "large, small"
    assert not list(target.glob("large*.*-of-[12]"))


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "many"])
def test_what_is_no_amount_is_refused_before_anything_is_unpacked(tmp_path, capsys, given):
    for main, option in (
        (short.main, "--budget-s"),
        (short.main, "--bundle-mib"),
        (bundle.main, "--bundle-mib"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["--out", str(tmp_path / "x"), f"{option}={given}"])
        assert ended.value.code == 2
        assert (
            f"argument {option}: expected a finite number above 0, got '{given}'"
            in capsys.readouterr().err
        )


def test_wheels_of_an_earlier_call_are_found_without_a_bundle(tmp_path, monkeypatch):
    inside = tmp_path / unpack.SITE / "nvidia/packages"
    inside.mkdir(parents=True)
    (tmp_path / unpack.SITE / "nvidia.pth").write_text("nvidia/packages\n")
    (tmp_path / "nitp_ops/objectives").mkdir(parents=True)
    seen = []
    monkeypatch.setattr(short, "ROOT", tmp_path)
    monkeypatch.setattr(
        short, "_run", lambda *_: seen.append((sys.path[1], os.environ["PYTHONPATH"])) or 0
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = os.environ.get("PYTHONPATH")
    assert short.main(["--budget-s", "9", "--bundle-mib", "9", "--dry-run"]) == 0
    assert os.environ.get("PYTHONPATH") == before
    ((second, environment),) = seen
    assert second == str(inside) and environment.split(os.pathsep)[:2] == [
        str(tmp_path / unpack.SITE),
        str(inside),
    ]


@pytest.mark.parametrize(
    ("most", "said"), [(9.0, "holds no bundle.json"), (1e-6, "above its limit")]
)
def test_a_bundle_that_cannot_be_used_is_one_line_and_the_run_goes_on(
    tmp_path, capsys, most, said, monkeypatch
):
    if most < 1:
        (tmp_path / unpack.MANIFEST).write_text('{"packed": {}}')
    ran = []
    monkeypatch.setattr(short, "_run", lambda *_: ran.append(1) or 0)
    options = ["--budget-s", "9", "--bundle-mib", str(most), "--bundle", str(tmp_path), "--dry-run"]
    assert short.main(options) == 0 and ran
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("bundle: ") and said in line


def test_a_package_without_a_wheel_and_a_folder_that_exists_are_one_line(
    tmp_path, capsys, monkeypatch
):
    assert bundle.main(["--bundle-mib", "9", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"benchmarks/gpu.sh: {tmp_path} exists\n"

    def fails(command, **_):
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: x\nERROR: No matching distribution found for it\n"
        )

    monkeypatch.setattr(bundle.subprocess, "run", fails)
    monkeypatch.setattr(bundle, "LIBRARY", "setup.py")
    assert bundle.main(["--bundle-mib", "9", "--out", str(tmp_path / "new")]) == 1
    assert (
        capsys.readouterr().err
        == "benchmarks/gpu.sh: liger-kernel: No matching distribution found for it\n"
    )


def test_a_source_tree_finds_its_objectives_without_an_installation(tmp_path, monkeypatch):
    (tmp_path / "nitp_ops").mkdir()
    (tmp_path / "objectives").mkdir()
    (tmp_path / "nitp_ops/__init__.py").touch()
    (tmp_path / "objectives/__init__.py").write_text("found = 7\n")
    monkeypatch.setattr(
        sys,
        "modules",
        {k: v for k, v in sys.modules.items() if not k.startswith("__editable___nitp")},
    )
    link = tmp_path / "nitp_ops/objectives"
    link.symlink_to("of a call that was killed")
    before = os.environ.get("PYTHONPATH")
    with carried.importable(tmp_path):
        code = "import nitp_ops.objectives as o; print(o.found)"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.stdout == "7\n", done.stderr
    assert not link.exists() and os.environ.get("PYTHONPATH") == before


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """What a build needs of a source tree, on a machine with an nvcc."""
    (tmp_path / "csrc/tools").mkdir(parents=True)
    (tmp_path / "csrc/tools/build_cuda.py").write_text(
        (ROOT / "csrc/tools/build_cuda.py").read_text()
    )
    monkeypatch.setattr(carried.shutil, "which", lambda name: name)
    return tmp_path


@pytest.mark.parametrize(
    ("capability", "code", "said"),
    [
        ("7.5", "", "no CUDA kernels for compute capability 7.5"),
        ("9.0", "raise SystemExit('it does not build')", "not build"),
    ],
)
def test_a_library_that_cannot_be_built_says_why(tree, capability, code, said):
    (tree / "setup.py").write_text(code)
    assert said in (carried.built(tree, capability, 60) or "")


def test_the_library_is_built_for_one_architecture(tree):
    (tree / "setup.py").write_text(
        "import os; open('asked', 'w').write(os.environ['NITP_CUDA_ARCHITECTURES'])"
    )
    for capability, architecture in (("9.0", "sm_90"), ("12.1", "sm_120")):
        assert (
            carried.built(tree, capability, 60) is None
            and (tree / "asked").read_text() == architecture
        )
    (tree / "setup.py").write_text("import time; time.sleep(60)")
    assert carried.built(tree, "9.0", 0.5) == "the build took more than 0 s"
