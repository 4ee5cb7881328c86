"""Captions of bundled scenes: what is there, and how the objects lie to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_CAPTION_WORDS = 24


@dataclass(frozen=True)
class SceneObject:
    """One glyph in a scene: its concept and name, box = x, y, w, h in pixels, and coarse position ("top left")."""

    concept: int
    name: str
    vendor: str
    box: tuple[int, int, int, int]
    position: str

    @property
    def centre(self) -> tuple[float, float]:
        x, y, w, h = self.box
        return x + w / 2, y + h / 2


def coarse_position(box: tuple[int, int, int, int], side: int) -> str:
    """Return where the centre of the box is: "top", "bottom", "left", "right", two of them, or "middle"."""
    x, y, w, h = box
    across, down = (x + w / 2) / side, (y + h / 2) / side
    words = ["top"] if down < 0.42 else ["bottom"] if down > 0.58 else []
    words += ["left"] if across < 0.42 else ["right"] if across > 0.58 else []
    return " ".join(words) or "middle"


def plain_caption(objects: Sequence[SceneObject]) -> str:
    """One caption for a scene: the name of a single object, the relation of two, the positions of more."""
    if len(objects) == 1:
        return objects[0].name
    if len(objects) == 2:
        return _relation(*objects)
    return _listed(sorted(objects, key=lambda item: (item.centre[1], item.centre[0])))


def varied_caption(objects: Sequence[SceneObject], rng: np.random.Generator) -> str:
    """A true caption of random form and order."""
    order = [objects[i] for i in rng.permutation(len(objects))]
    form = rng.random()
    if len(order) == 1:
        name, where = order[0].name, order[0].position
        longer = (with_article(name), f"picture of {name}", f"{name} in the picture", f"{name} {where}")
        return (name, name, name, *longer)[int(form * (3 + len(longer)))]
    if form < 0.25:
        return " and ".join(item.name for item in order)
    if form < 0.35:
        return f"{with_article(order[0].name)} with " + " and ".join(item.name for item in order[1:])
    if form < 0.45:
        return " then ".join(o.name for o in sorted(order, key=lambda o: o.centre[0])) + " from left to right"
    if len(order) == 2 and form < 0.75:
        return _relation(*order)
    return _listed(order)


def with_article(name: str) -> str:
    """The name with "a" or "an"; plurals (glasses, not glass or octopus) stay as they are."""
    if name.endswith("s") and not name.endswith(("ss", "us")):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _relation(first: SceneObject, second: SceneObject) -> str:
    across = second.centre[0] - first.centre[0]
    down = second.centre[1] - first.centre[1]
    if abs(across) >= abs(down):
        return f"{first.name} {'left' if across > 0 else 'right'} of {second.name}"
    return f"{first.name} {'above' if down > 0 else 'below'} {second.name}"


def _listed(objects: Sequence[SceneObject]) -> str:
    """Names with positions, without the positions where that would be too long."""
    caption = " and ".join(f"{item.name} {item.position}" for item in objects)
    return caption if len(caption.split()) <= MAX_CAPTION_WORDS else " and ".join(item.name for item in objects)


def region_caption(item: SceneObject, rng: np.random.Generator) -> str:
    return (item.name, item.name, with_article(item.name), f"{item.name} {item.position}")[rng.integers(4)]
