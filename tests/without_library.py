"""A pytest plugin (`-p without_library`): every op is served as on a machine that has no compiled library."""

from __future__ import annotations

import processor

from nitp_ops.core import library
from nitp_ops.kernels import select

select.load_error = library.load_error = "hidden by tests/without_library.py"
processor.HAS_OWN_GEMM = False
