"""A pytest plugin (`-p tests.support.without_library`): every op is served as on a machine that has
no compiled library."""

from __future__ import annotations

from nitp_ops.core import library
from nitp_ops.kernels import select
from tests.support import processor

select.load_error = library.load_error = "hidden by tests/support/without_library.py"
processor.HAS_OWN_GEMM = False
