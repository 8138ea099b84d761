"""Logits as the loss takes them: z = transform(x) of csrc/formulas/cross_entropy.h."""

# The body of a @triton.jit function is Triton's language, which only looks like Python to a type
# checker.
# pyright: reportInvalidTypeForm=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    # sinh / cosh by their series near zero, where (1 - e) / (1 + e) cancels; seven terms are exact
    # in float64
    t = x * x
    sinh = 1 + t * (1 / 110) * (1 + t * (1 / 156) * (1 + t * (1 / 210)))
    sinh = x * (
        1 + t * (1 / 6) * (1 + t * (1 / 20) * (1 + t * (1 / 42) * (1 + t * (1 / 72) * sinh)))
    )
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    return tl.where(t < 0.25, sinh / tl.sqrt(1 + sinh * sinh), tl.where(x < 0, -far, far))


@triton.jit
def read_logits(
    logits, bias, column, inside, logit_scale, softcap, CAPPED: tl.constexpr, A: tl.constexpr
):
    """z = cap tanh(scale (x + bias) / cap), or scale (x + bias)."""
    x = tl.load(logits + column, mask=inside, other=0.0).to(A)
    if bias is not None:
        x += tl.load(bias + column, mask=inside, other=0.0)
    x = logit_scale * x
    if CAPPED:
        x = softcap * _tanh(x / softcap)
    return x
