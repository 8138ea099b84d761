"""Builds nitp_ops: with its compiled row kernels where torch and a C++ compiler are found, else as pure Python."""

import os
import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "nitp_ops/libnitp_ops.so"
native = runpy.run_path(str(ROOT / "csrc/build.py"))
compiler = os.environ.get("CXX", "g++")
torch = native["find_torch"]()
missing = native["why_not"](torch, compiler)


class BuildNative(build_ext):
    """One `Extension` stands for both shared objects; ninja builds them into the package folder."""

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        self.copy_file(str(Path(self.build_lib) / LIBRARY), str(ROOT / LIBRARY))

    def build_extension(self, ext):
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        native["build"](torch, compiler, Path(self.build_temp).resolve(), module.parent, module.name)

    def get_outputs(self):
        return [*super().get_outputs(), str(Path(self.build_lib) / LIBRARY)]


if missing:
    line = "!" * 100
    print(
        f"{line}\nnitp_ops: building a PURE-PYTHON wheel without compiled kernels: {missing}.\n"
        f"CPU ops will raise BackendError unless backend='reference'. Install torch>=2.11 and g++ first, then\n"
        f"reinstall nitp_ops.\n{line}",
        file=sys.stderr,
        flush=True,
    )

setup(
    packages=["nitp_ops", "nitp_ops.triton", "nitp_ops.integrations", "nitp_ops.objectives"],
    package_dir={"nitp_ops": "nitp_ops", "nitp_ops.objectives": "objectives"},
    package_data={"nitp_ops": ["py.typed"]},
    ext_modules=[] if missing else [Extension("nitp_ops._C", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
