"""Sparsities, and the number of weights that they say. Needs no torch.

Sparsity is the fraction of prunable weights that are zero. Everything is computed in decimal arithmetic: 0.57 of 100 is
57, though 0.57 * 100 < 57 in binary.
"""

from decimal import Decimal, InvalidOperation
from fractions import Fraction

from sparsity.errors import UserError

SCHEDULES = ("linear", "exp", "const", "cubic")
# Digits of a sparsity, before and after the point: on the command line, and at most (a float written out has 1074). To
# compute with 1e-999999999 would take forever.
_TYPED, _DIGITS = 25, 1100

Sparsity = str | int | float | Decimal | Fraction


def fraction(sparsity: Sparsity) -> Fraction:
    """The exact value of a sparsity as it is written: a float counts as its shortest decimal form. UserError outside
    [0, 1).
    """
    exact = as_written(sparsity)
    if exact is None or not 0 <= exact < 1:
        raise UserError(f"sparsity must be a fraction between 0 and 1, got {sparsity!r:.60}")
    return exact


def as_written(number: Sparsity) -> Fraction | None:
    """Return the exact value of a number as it is written, "0.7" or "7/10"; None for what is no finite number."""
    try:
        if isinstance(number, Fraction):
            return number
        if isinstance(number, float):
            return Fraction(float.__repr__(number))  # of numpy's floats too, whose own repr is no number
        text = str(number)
        return Fraction(text) if "/" in text or _short(Decimal(text)) else None
    except (ValueError, ArithmeticError):
        return None


def _short(value: Decimal, digits: int = _DIGITS) -> bool:
    exponent = value.as_tuple().exponent  # a letter for what is not finite
    return isinstance(exponent, int) and -digits <= exponent <= digits


def budget(sparsity: Sparsity, numel: int) -> int:
    """How many of `numel` weights go: floor(sparsity * numel), exactly."""
    return int(fraction(sparsity) * numel // 1)


def check_schedule(steps: int, schedule: str) -> None:
    """Raise UserError for a number of steps, or a name of a schedule, that cannot be."""
    if steps < 1:
        raise UserError(f"epochs must be at least 1, got {steps!r}")
    if schedule not in SCHEDULES:
        raise UserError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")


def step_sparsity(sparsity: Sparsity, step: int, steps: int, schedule: str) -> Sparsity:
    """Sparsity after step 1 .. `steps` of an iterative method; the last is `sparsity` itself, exactly.

    "exp": 1 - (1 - s)^(t / T), "linear": s * t / T, "const": s (arXiv 2006.09081); "cubic": s (1 - (1 - t / T)^3)
    (arXiv 1710.01878). Exact but for "exp".
    """
    if step == steps or schedule == "const":
        return sparsity
    if schedule == "linear":
        return fraction(sparsity) * step / steps
    if schedule == "cubic":
        return fraction(sparsity) * (1 - (1 - Fraction(step, steps)) ** 3)
    if schedule == "exp":
        return 1 - float(1 - fraction(sparsity)) ** (step / steps)
    raise UserError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")


def parse_sparsities(text: str) -> list[Decimal]:
    """The fractions in "63,75,90". Percentages from 1 to 99.99 or, below 1, fractions. UserError that names the bad
    item.
    """
    return [_parse_sparsity(item.strip(), text) for item in text.split(",")]


def _parse_sparsity(item: str, text: str) -> Decimal:
    try:
        value = Decimal(item)
    except InvalidOperation:
        raise UserError(
            f"sparsities are comma-separated numbers like 63,75,90, got {item!r:.60} in {text!r:.60}"
        ) from None
    if not _short(value, _TYPED) or not 0 < value <= Decimal("99.99"):
        raise UserError(
            f"a sparsity is a percentage from 1 to 99.99 or a fraction below 1, got {item!r:.60} in {text!r:.60}"
        )
    return value if value < 1 else value / 100
