"""The row kernels in torch operations, for devices that have neither compiled nor Triton kernels.

The equations are those of csrc/formulas/, the laws those of the compiled
kernels: float32 arithmetic (float64 for float64), one rounding at the store, rows of weight zero
    left out and not
multiplied by it. Each function here is a row of the table (`table.py`).
"""

from __future__ import annotations

from .. import table

__getattr__ = table.attributes("torch_rows")
