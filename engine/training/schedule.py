"""Learning-rate schedules as functions of the step alone, so that a resumed run needs no scheduler state."""

import math


def warmup_cosine(step: int, total: int, warmup: int, floor: float = 0.0) -> float:
    """Factor of the peak rate at `step` (from 0): linear over `warmup` steps, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * _progress(step, total, warmup)))


def warmup_linear(step: int, total: int, warmup: int, floor: float = 0.0) -> float:
    """Factor of the peak rate at `step` (from 0): linear up over `warmup` steps, then linear down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1.0 - floor) * (1.0 - _progress(step, total, warmup))


def _progress(step: int, total: int, warmup: int) -> float:
    return min(1.0, (step - warmup) / max(1, total - warmup))


def cooldown(step: int, total: int, length: int) -> float:
    """Factor 1, then linear towards 0 over the last `length` of `total` steps."""
    return min(1.0, (total - step) / length) if length else 1.0
