"""The learning rate: warm up, stay, decay."""

from __future__ import annotations


def warmup_stable_decay(step: int, steps: int, peak: float, warmup: float, decay: float) -> float:
    """Learning rate of `step` (0-based): linear up, constant, linear to zero after the last step.

    Args:
        step: the step about to be taken, in [0, steps).
        steps: the length of the whole run.
        peak: the learning rate of the stable phase.
        warmup: fraction of the run that warms up; the first step already has a rate above zero.
        decay: fraction of the run, at its end, that decays.

    Example:
        >>> [round(warmup_stable_decay(step, 10, 1.0, 0.2, 0.4), 2) for step in range(10)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]

    Source: warmup-stable-decay (MiniCPM, arXiv 2404.06395), with a linear decay.
    """
    rising = (step + 1) / max(1.0, warmup * steps)
    falling = (steps - step) / max(1.0, decay * steps)
    return peak * min(1.0, rising, falling)
