"""setuptools' commands: the compiled library, the wheel that holds it, the archive of its sources."""

from __future__ import annotations

import json
import os
import runpy
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parents[1]
LIBRARY = "nitp_ops/libnitp_ops.so"
PURE = os.environ.get("NITP_OPS_PURE") == "1"


class BuildNative(build_ext):
    """One `Extension` stands for both shared objects; ninja builds them into the package folder."""

    def initialize_options(self):
        super().initialize_options()
        self.portable = self.facts = None

    def finalize_options(self):
        super().finalize_options()
        self.portable = getattr(self.distribution.get_command_obj("bdist_wheel"), "portable", None)

    def build_extension(self, ext):
        native = runpy.run_path(str(TOOLS / "build.py"))
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve()
        headers = Path(sysconfig.get_path("include"), "Python.h")
        ext.optional = not headers.exists()  # setuptools then asks for no file of it
        if ext.optional:
            print(
                f"nitp_ops: built without nitp_ops._C, which nothing needs: {headers} is absent",
                file=sys.stderr,
            )
        name = None if self.portable or ext.optional else module.name
        try:
            compiler = native["find_compiler"](self.portable)
            native["build"](compiler, work, module.parent, name, self.portable)
        except native["BuildError"] as error:
            sys.exit(str(error))
        self.facts = json.loads((work / "facts.json").read_text())

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        self.copy_file(str(Path(self.build_lib) / LIBRARY), str(ROOT / LIBRARY))

    def get_outputs(self):
        modules = (
            []
            if self.portable or any(ext.optional for ext in self.extensions)
            else super().get_outputs()
        )
        return [*modules, str(Path(self.build_lib) / LIBRARY)]


class Wheel(bdist_wheel):
    """A wheel that holds the library names in its SBOM what is linked into it."""

    user_options: ClassVar = [
        *bdist_wheel.user_options,
        ("portable=", None, "x86_64 or aarch64: for any Linux there"),
    ]

    def initialize_options(self):
        super().initialize_options()
        self.portable = None

    def finalize_options(self):
        if self.portable and PURE:
            sys.exit(
                "nitp_ops: portable=true and NITP_OPS_PURE=1 exclude each other: unset one of them"
            )
        if self.portable:  # apart from what is built for this machine
            self.distribution.get_command_obj(
                "build"
            ).build_base = f"build/portable-{self.portable}"
        super().finalize_options()

    def get_tag(self):
        return (
            runpy.run_path(str(TOOLS / "portable.py"))["tag"](self.portable)
            if self.portable
            else super().get_tag()
        )

    def write_wheelfile(self, wheelfile_base, *arguments, **options):
        super().write_wheelfile(wheelfile_base, *arguments, **options)
        facts = getattr(self.distribution.get_command_obj("build_ext"), "facts", None)
        if facts:  # an editable install has no wheel of its own
            runpy.run_path(str(TOOLS / "sbom.py"))["write"](
                Path(wheelfile_base), self.distribution.get_version(), facts
            )


class SourceArchive(sdist):
    """The sources with a note of their commit, for there is no git in an archive."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        runpy.run_path(str(TOOLS / "revision.py"))["note"](Path(base_dir) / "csrc")


COMMANDS = {"build_ext": BuildNative, "bdist_wheel": Wheel, "sdist": SourceArchive}
