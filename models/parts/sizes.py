"""Numbers in the configuration of a model."""

from dataclasses import fields
from typing import Any

from sparsity.errors import UserError


def check_sizes(config: Any, *zero: str) -> None:
    """Raise UserError where a number of this dataclass is negative, or an integer is 0 that is not among `zero`."""
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            least = 1 if isinstance(value, int) and f.name not in zero else 0
            if value < least:
                raise UserError(f"{f.name} must be at least {least}, got {value!r}")
