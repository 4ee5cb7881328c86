"""Which of a user's own images are held out for validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from sparsity.errors import UserError

T = TypeVar("T")

SPLIT_SEED = 0  # whatever the seed of a run, so that runs with several seeds are compared on the same images


def split(images: Sequence[T], fraction: float, where: str) -> tuple[list[T], list[T]]:
    """Return the images that are trained on and those that are held out, both in their order.

    fraction: of the images that are held out, at least one and not all; 0 holds out none. UserError for a single one.
    """
    if not fraction:
        return list(images), []
    if len(images) < 2:
        raise UserError(f"{where}: one image alone cannot be trained and validated on: give --val_fraction 0")
    held = min(len(images) - 1, max(1, round(fraction * len(images))))
    chosen = set(np.random.default_rng(SPLIT_SEED).permutation(len(images))[:held].tolist())
    train = [image for number, image in enumerate(images) if number not in chosen]
    return train, [images[number] for number in sorted(chosen)]
