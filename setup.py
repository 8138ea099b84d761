"""Builds nitp_ops with its compiled row kernels; NITP_OPS_PURE=1 leaves them out on purpose."""

import runpy
from pathlib import Path

from setuptools import Extension, find_packages, setup

commands = runpy.run_path(str(Path(__file__).resolve().parent / "csrc/tools/commands.py"))

setup(
    packages=[
        *find_packages(include=["nitp_ops", "nitp_ops.*"]),
        "nitp_ops.objectives",
        *(f"nitp_ops.objectives.{name}" for name in find_packages("objectives")),
    ],
    package_dir={"nitp_ops": "nitp_ops", "nitp_ops.objectives": "objectives"},
    package_data={"nitp_ops": ["py.typed"]},
    ext_modules=[] if commands["PURE"] else [Extension("nitp_ops._C", sources=[])],
    cmdclass=commands["COMMANDS"],
)
