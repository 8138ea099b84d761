"""Online softmax sums without a reduction across threads inside the loop.

Every lane of a block keeps the maximum of the numbers that it has met and the sum of exp(x -
maximum); one reduction at the end joins the lanes. That costs one exponential a number, as two
passes would, and no barrier a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: The maximum of a lane that has met nothing: finite, so that -inf may follow (exp(-inf - -inf) is
#: NaN).
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def absorb(x, most, total):
    """One more number a lane. A NaN enters the sum and leaves the maximum alone."""
    step = x - most
    shrink = tl.exp(-tl.abs(step))
    rises = step > 0
    return tl.where(rises, x, most), tl.where(rises, total * shrink + 1, total + shrink)


@triton.jit
def join(most, total):
    """(maximum, sum of exp(x - maximum)) over all lanes; the sum in float64, whose log is then
    exact near 1."""
    maximum = tl.max(most)
    return maximum, tl.sum((total * tl.exp(most - maximum)).to(tl.float64))
